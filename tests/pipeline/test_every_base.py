"""Bases that are not plain decoders: they train, or are refused before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.command_line import CommandLine
from support.tiny_models import save_base, small_model

from loratune.cli.dispatch import dispatch

MAMBA: dict[str, Any] = {"state_size": 4, "time_step_rank": 4}
PHIMOE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA3: dict[str, Any] = {
    "text_config": {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"], "initializer_range": 0.2,
    },
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    },
    "mm_tokens_per_image": 4,
}  # fmt: skip


def recipe(folder: Path, name: str, **settings: Any) -> list[str]:
    """Words of a recipe on a tiny model of type ``name``."""
    save_base(folder / name, small_model(name, **settings))
    rows = "".join(json.dumps({"prompt": "ab" * n, "completion": "cd"}) + "\n" for n in range(1, 9))
    (folder / "rows.jsonl").write_text(rows)
    words = ["recipe=smoke", "data=local", f"data.path={folder / 'rows.jsonl'}", "trainer.steps=3"]
    return [*words, f"model.path={folder / name}", "targets=all_linear", "data.eval_fraction=0.25"]


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("mamba", MAMBA, "2 layers without effect on the loss: backbone.layers.*.mixer.dt_proj"),
        ("phimoe", PHIMOE, "2 layers of another formula than x Wᵀ + bias: model.layers.*.mlp"),
        ("gemma3", GEMMA3, "9 layers without effect on the loss: model.vision_tower (9)"),
    ],
)  # fmt: skip
def test_a_word_leaves_out_what_no_adapter_can_help_in_train_plan_and_counts(
    name: str, settings: dict[str, Any], said: str, cli: CommandLine, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = recipe(tmp_path, name, **settings)
    trained = cli.succeeds("train", *words, "stages=[train]", "out=run")
    assert f"note: all_linear leaves out {said}" in trained.text
    assert dispatch("plan", [*words, "time=false"]) == 0
    assert f"note: all_linear leaves out {said}" in capsys.readouterr().out.replace("\n", " ")
    assert dispatch("count-params", [*words, "variants=lora", "format=json"]) == 0
    counted = json.loads(capsys.readouterr().out)["variants"][0]["trainable"]
    (report,) = (
        variant
        for variant in json.loads(Path("run/parameters.json").read_text())["variants"]
        if variant["variant"] == "lora"
    )
    assert counted == report["trainable"]


@pytest.mark.parametrize(
    ("name", "settings", "more", "code", "said"),
    [
        ("mamba", MAMBA, ["targets.modules=[in_proj,dt_proj]"], 4, ["mixer.dt_proj (2)"]),
        ("bert", {}, [], 4, ["not causal", "is_decoder=true"]),
        (
            "jetmoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16},
            ["trainer.gradient_checkpointing=true"], 2, ["trainer.gradient_checkpointing"],
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_the_first_step_by_plan_and_train(
    name: str, settings: dict[str, Any], more: list[str], code: int, said: list[str],
    cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [*recipe(tmp_path, name, **settings), *more]
    refused = cli("train", *words, "stages=[train]", "out=run")
    assert refused.code == code and all(text in refused.err for text in said), refused.err
    assert "step 1" not in refused.text and "Traceback" not in refused.err
    assert dispatch("plan", [*words, "time=false"]) == code
    planned = capsys.readouterr().err
    assert all(text in planned for text in said)
