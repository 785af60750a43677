"""``loratune export``: portable, lora and compact forms, each the original in other words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import CommandLine
from support.tiny_models import load_plain, logits
from support.tolerance import T0, T1, largest

from interchange.adapters import (
    load_here,
    load_with_peft,
    peft_configs,
    tensors_of,
    train_here,
    write_with_peft,
)
from loratune import files
from loratune.errors import MergeError

MIXED = ("rslora", "patterns", "embedding", "vera", "vera, projections not saved")


@pytest.mark.case(73, T1)
@pytest.mark.parametrize("form", ["portable", "lora"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [("opt", kind) for kind in MIXED] + [("gpt2", "patterns"), ("llama", "vera")],
)
def test_plain_forms_need_nothing_but_one_rank_and_compute_the_same_in_peft(
    cli: CommandLine, bases: dict[str, Path], tmp_path: Path, form: str, family: str, kind: str
) -> None:
    base = bases[family]
    folder = write_with_peft(base, peft_configs(family)[kind], tmp_path / "adapter")
    cli.succeeds(
        "export", f"model.path={base}", f"adapter_path={folder}", f"format={form}", "out=plain"
    )
    plain = tmp_path / "plain"
    config = json.loads((plain / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"]
    assert not any(config.get(key) for key in ("use_rslora", "rank_pattern", "alpha_pattern"))
    tensors = tensors_of(plain)
    assert {t.shape[0] for name, t in tensors.items() if "_A" in name} == {config["r"]}
    assert all("lora_" in name for name in tensors)
    # In fp64: what is left is the rounding of the folded factors to the fp32 of the file.
    expected = logits(load_with_peft(base, folder).double())
    scale = float(expected.abs().max())
    T1.check(logits(load_with_peft(base, plain).double()) / scale, expected / scale)
    proof = files.read_sealed_json(plain / "certificate.json")["proof"]
    assert proof["worst_relative_difference"] <= proof["tolerance"] == 1e-6
    assert proof["logits"]["tokens"] > 0
    assert proof["logits"]["max_difference"] <= 1e-5 * proof["logits"]["max_logit"]
    assert proof["logits"]["adapter_effect"] > 1e-2


FROZEN = {
    "vera": ["adapter=vera", "adapter.rank=8", "targets=all_linear"],
    "vera with alpha": ["adapter=vera", "adapter.rank=8", "adapter.alpha=12"],
    "lora_fa": ["adapter=lora_fa", "adapter.rank=4", "adapter.alpha=6"],
    "lora_fa orthonormal": ["adapter=lora_fa", "adapter.rank=4", "adapter.init=orthonormal"],
    "lora_fa gaussian with a saved head": [
        "adapter=lora_fa", "adapter.rank=4", "adapter.init=gaussian",
        "targets.modules_to_save=[lm_head]",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", FROZEN)
def test_compact_stores_what_was_trained_and_comes_back_bit_for_bit(
    cli: CommandLine, bases: dict[str, Path], rows: Path, tmp_path: Path, kind: str
) -> None:
    base = bases["llama"]
    folder = train_here(cli, base, rows, *FROZEN[kind], "trainer.seed=7")
    cli.succeeds("export", "run=run", "format=compact", "out=compact")
    before, kept = tensors_of(folder), tensors_of(tmp_path / "compact")
    left_out = set(before) - set(kept)
    frozen = {name for name in before if "lora_A" in name and kind.startswith("lora_fa")}
    assert left_out == (frozen or {"base_model.vera_A", "base_model.vera_B"})
    T0.check(
        logits(load_here(base, tmp_path / "compact").model), logits(load_here(base, folder).model)
    )
    cli.succeeds(
        "export", "format=peft", "adapter_path=compact", f"model.path={base}", "out=restored"
    )
    for name in ("adapter_model.safetensors", "adapter_config.json", "loratune.json"):
        assert (tmp_path / "restored" / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_compact_adapter_with_another_seed_is_refused(
    cli: CommandLine, bases: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    train_here(cli, bases["opt"], rows, *FROZEN["lora_fa"])
    cli.succeeds("export", "run=run", "format=compact", "out=compact")
    facts = files.read_sealed_json(tmp_path / "compact" / "loratune.json")
    facts["regenerate"]["seed"] += 1
    files.write_sealed_json(tmp_path / "compact" / "loratune.json", facts)
    said = cli.refuses(
        "export", "adapter_path=compact", f"model.path={bases['opt']}", "out=restored"
    )
    assert "not the recorded ones" in said and not (tmp_path / "restored").exists()


def test_compact_refuses_what_no_seed_gives(
    cli: CommandLine, bases: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    train_here(cli, bases["opt"], rows, "adapter=lora_fa", "adapter.rank=4", "adapter.init=svd")
    assert "seed" in cli.refuses("export", "run=run", "format=compact", "out=a")
    folder = write_with_peft(bases["opt"], peft_configs("opt")["lora"], tmp_path / "adapter")
    words = [f"adapter_path={folder}", f"model.path={bases['opt']}", "format=compact", "out=b"]
    assert "every tensor of this adapter was trained" in cli.refuses("export", *words)


def test_compact_vera_loads_in_peft_as_it_is(
    cli: CommandLine, bases: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    folder = train_here(cli, bases["opt"], rows, *FROZEN["vera"])
    cli.succeeds("export", "run=run", "format=compact", "out=compact")
    T0.check(
        logits(load_with_peft(bases["opt"], tmp_path / "compact")),
        logits(load_with_peft(bases["opt"], folder)),
    )


def test_a_form_that_computes_something_else_is_never_published(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratune.adapter_files.peft_format import read_adapter
    from loratune.config.schema import ExportFormat
    from loratune.stages import export as stage

    folder = write_with_peft(bases["opt"], peft_configs("opt")["rslora"], tmp_path / "adapter")
    honest = stage.FORMS[ExportFormat.portable]

    def one_sign_flipped(offline: Any) -> Any:
        config, tensors, facts = honest(offline)
        name = next(name for name in tensors if "lora_B" in name)
        return config, {**tensors, name: -tensors[name]}, facts

    monkeypatch.setitem(stage.FORMS, ExportFormat.portable, one_sign_flipped)
    with pytest.raises(MergeError, match="ΔW differs"):
        stage.export(read_adapter(folder), bases["opt"], tmp_path / "out", ExportFormat.portable)
    assert not (tmp_path / "out").exists()


def test_the_logits_proof_alone_sees_a_form_that_differs(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    from loratune.adapter_files.peft_format import read_adapter
    from loratune.merging.logits import prove_same_logits

    folder = write_with_peft(bases["opt"], peft_configs("opt")["lora"], tmp_path / "one")
    other = write_with_peft(bases["opt"], peft_configs("opt")["rslora"], tmp_path / "two")
    with pytest.raises(MergeError, match="logits differ"):
        prove_same_logits(bases["opt"], read_adapter(folder), read_adapter(other), exact=False)


def test_portable_refuses_modules_trained_in_full(
    cli: CommandLine, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_with_peft(bases["opt"], peft_configs("opt")["modules_to_save"], tmp_path / "a")
    words = [f"adapter_path={folder}", f"model.path={bases['opt']}", "format=portable", "out=b"]
    assert "lm_head" in cli.refuses("export", *words)


def test_a_plain_lora_of_vera_changes_the_base_as_vera_does(
    cli: CommandLine, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["opt"]
    folder = write_with_peft(base, peft_configs("opt")["vera"], tmp_path / "adapter")
    cli.succeeds("export", f"model.path={base}", f"adapter_path={folder}", "format=lora", "out=p")
    assert largest(logits(load_with_peft(base, tmp_path / "p")), logits(load_plain(base))) > 1e-2
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(tmp_path / "p").values())
