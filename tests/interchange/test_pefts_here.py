"""Adapters that PEFT wrote: evaluated, trained further, merged and exported by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.command_line import CommandLine
from support.peft_oracle import lora_config, vera_config
from support.tiny_models import load_plain, logits
from support.tolerance import T0, T2, largest
from support.variants import in_peft

from interchange.adapters import (
    KINDS,
    load_here,
    load_with_peft,
    peft_configs,
    rewrite_tensors,
    tensors_of,
    train_words,
    variant_of,
    write_with_peft,
)


@pytest.mark.case(67, T0)
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (family, kind)
        for family in ("opt", "gpt2", "llama")
        for kind in KINDS
        if in_peft(variant_of(kind), family)
    ],
)
def test_what_peft_wrote_gives_pefts_logits(
    bases: dict[str, Path], tmp_path: Path, family: str, kind: str
) -> None:
    base = bases[family]
    folder = write_with_peft(base, peft_configs(family)[kind], tmp_path / "adapter")
    expected = logits(load_with_peft(base, folder))
    T0.check(logits(load_here(base, folder).model), expected)
    T2.check(logits(load_here(base, folder, reference=False).model), expected)
    assert largest(expected, logits(load_plain(base))) > 1e-2


@pytest.mark.parametrize(
    ("family", "kind"),
    [("opt", kind) for kind in KINDS]
    + [
        ("gpt2", "embedding"),
        ("llama", "vera"),
        ("gpt2", "dora, embedding"),
        ("gpt2", "ia3"),
        ("llama", "oft"),
    ],
)
def test_what_peft_wrote_is_evaluated_trained_further_merged_and_exported(
    cli: CommandLine, bases: dict[str, Path], rows: Path, tmp_path: Path, family: str, kind: str
) -> None:
    base = bases[family]
    folder = write_with_peft(base, peft_configs(family)[kind], tmp_path / "adapter")
    expected = logits(load_with_peft(base, folder))
    words = [f"model.path={base}", f"adapter_path={folder}"]

    scores = cli.succeeds(
        "evaluate", *words, f"data.eval_path={rows}", "evaluate.generate=false", "format=json",
        "trainer.precision=fp32",
    )  # fmt: skip
    measured = json.loads(scores.out[scores.out.index("{") :])
    assert measured["adapted"]["loss"] != measured["base"]["loss"]

    further = [f"adapter={variant_of(kind)}", f"adapter_path={folder}", "trainer.lr=0.001"]
    cli.succeeds(*train_words(base, rows, "run", *further))
    before, after = tensors_of(folder), tensors_of(tmp_path / "run" / "adapter")
    trained = [name for name in before if not name.startswith("base_model.vera_")]
    trained = [name for name in trained if ".base_layer." not in name]
    assert set(after) == {name for name in before if ".base_layer." not in name}
    assert all(0 < largest(after[name], before[name]) < 0.05 for name in trained)

    cli.succeeds("merge", *words, "out=merged")
    T2.check(logits(load_plain(tmp_path / "merged")), expected)

    cli.succeeds("export", *words, "format=peft", "out=exported")
    T0.check(logits(load_with_peft(base, tmp_path / "exported")), expected)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_refused_with_the_setting_named(
    cli: CommandLine, bases: dict[str, Path], tmp_path: Path, bias: str
) -> None:
    config = lora_config(r=4, lora_alpha=8, target_modules=["q_proj"], bias=bias)
    folder = write_with_peft(bases["opt"], config, tmp_path / "adapter")
    said = cli.refuses(
        "merge", f"model.path={bases['opt']}", f"adapter_path={folder}", "out=merged"
    )
    assert f"bias={bias}" in said and not (tmp_path / "merged").exists()


@pytest.mark.case(12, T0)
@pytest.mark.parametrize(
    ("setting", "value"),
    [("lora_bias", True), ("use_qalora", True), ("target_parameters", [3]), ("r", 0)],
)
def test_what_changes_the_mathematics_and_is_not_here_is_refused_by_name(
    cli: CommandLine, bases: dict[str, Path], tmp_path: Path, setting: str, value: object
) -> None:
    config = lora_config(r=4, lora_alpha=8, target_modules=["q_proj"])
    folder = write_with_peft(bases["opt"], config, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))
    said = cli.refuses("export", f"model.path={bases['opt']}", f"adapter_path={folder}", "out=x")
    assert (setting if setting != "r" else "rank") in said and not (tmp_path / "x").exists()


@pytest.mark.case(69, T0)
def test_missing_extra_and_misshapen_tensors_are_listed_in_one_go(
    cli: CommandLine, bases: dict[str, Path], tmp_path: Path
) -> None:
    config = lora_config(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    folder = write_with_peft(bases["opt"], config, tmp_path / "adapter")
    tensors = tensors_of(folder)
    start = "base_model.model.model.decoder.layers"
    del tensors[f"{start}.0.self_attn.q_proj.lora_B.weight"]
    tensors[f"{start}.1.fc1.lora_A.weight"] = torch.zeros(4, 16)
    tensors[f"{start}.1.self_attn.v_proj.lora_A.weight"] = torch.zeros(4, 15)
    rewrite_tensors(folder, tensors)
    said = cli.refuses("export", f"model.path={bases['opt']}", f"adapter_path={folder}", "out=x")
    assert f"'{start}.0.self_attn.q_proj.lora_B.weight' is missing" in said
    assert f"'{start}.1.fc1.lora_A.weight' is unexpected" in said
    assert "v_proj.lora_A.weight" in said and "[4, 15]" in said and "[4, 16]" in said


@pytest.mark.case(52, T0)
def test_vera_without_stored_projections_draws_the_same_ones_again(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["llama"]
    settings = {"r": 8, "target_modules": ["q_proj", "v_proj"], "projection_prng_key": 9}
    full = write_with_peft(base, vera_config(**settings), tmp_path / "full")
    bare = write_with_peft(base, vera_config(save_projection=False, **settings), tmp_path / "bare")
    assert {"base_model.vera_A", "base_model.vera_B"} == set(tensors_of(full)) - set(
        tensors_of(bare)
    )
    T0.check(logits(load_here(base, bare).model), logits(load_here(base, full).model))


@pytest.mark.case(51, T0)
def test_stored_projections_are_used_as_stored_even_if_no_seed_gives_them(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["llama"]
    config = vera_config(r=8, target_modules=["q_proj", "v_proj"])
    folder = write_with_peft(base, config, tmp_path / "adapter")
    before = logits(load_here(base, folder).model)
    tensors = tensors_of(folder)
    rewrite_tensors(folder, {**tensors, "base_model.vera_A": tensors["base_model.vera_A"] + 1})
    wrapped = load_here(base, folder)
    layer = next(iter(wrapped.adapters.values()))
    T0.check(layer.shared_tensors()["base_model.vera_A"], tensors["base_model.vera_A"] + 1)
    assert largest(logits(wrapped.model), before) > 1e-3
    T0.check(logits(wrapped.model), logits(load_with_peft(base, folder)))


def test_vera_that_claims_stored_projections_and_lacks_them_is_refused(
    cli: CommandLine, bases: dict[str, Path], tmp_path: Path
) -> None:
    config = vera_config(r=8, target_modules=["q_proj"])
    folder = write_with_peft(bases["opt"], config, tmp_path / "adapter")
    tensors = tensors_of(folder)
    rewrite_tensors(folder, {k: v for k, v in tensors.items() if not k.startswith("base_model.v")})
    said = cli.refuses("export", f"model.path={bases['opt']}", f"adapter_path={folder}", "out=x")
    assert "base_model.vera_A" in said and "base_model.vera_B" in said


@pytest.mark.case(17, T0)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_wrong_fan_in_fan_out_changes_nothing(
    bases: dict[str, Path], tmp_path: Path, family: str
) -> None:
    base = bases[family]
    folder = write_with_peft(base, peft_configs(family)["lora"], tmp_path / "adapter")
    expected = logits(load_here(base, folder).model)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "fan_in_fan_out": not config["fan_in_fan_out"]}))
    T0.check(logits(load_here(base, folder).model), expected)


def test_an_embedding_adapter_that_brings_another_vocabulary_is_refused(
    cli: CommandLine, bases: dict[str, Path], tmp_path: Path
) -> None:
    config = lora_config(r=4, lora_alpha=8, target_modules=["embed_tokens"])
    folder = write_with_peft(bases["opt"], config, tmp_path / "adapter")
    tensors = tensors_of(folder)
    (key,) = (name for name in tensors if name.endswith(".base_layer.weight"))
    rewrite_tensors(folder, {**tensors, key: tensors[key] + 1})
    said = cli.refuses("export", f"model.path={bases['opt']}", f"adapter_path={folder}", "out=x")
    assert "another base weight" in said and key in said
