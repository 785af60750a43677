"""Adapters that loratune trained and wrote, loaded by PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import CommandLine
from support.tiny_models import logits
from support.tolerance import T0, T1, largest
from support.variants import in_peft, structures_in_peft

from interchange.adapters import (
    load_here,
    load_with_peft,
    tensors_of,
    train_here,
    variant_of,
)

OURS = {
    "lora": ["adapter=lora", "adapter.rank=4", "targets=attention_qv"],
    "lora_fa": ["adapter=lora_fa", "adapter.rank=4", "targets=attention"],
    "lora_plus": ["adapter=lora_plus", "adapter.rank=4", "targets=all_linear", "adapter.alpha=6"],
    "rslora": ["adapter=lora", "adapter.rank=4", "adapter.rslora=true", "targets=mlp"],
    "saved head": ["adapter=lora", "adapter.rank=4", "targets.modules_to_save=[lm_head]"],
    "dora": ["adapter=dora", "adapter.rank=4", "targets=all_linear", "adapter.alpha=6"],
    "ia3": ["adapter=ia3", "targets=all_linear"],
    "vera": ["adapter=vera", "adapter.rank=8", "targets=all_linear"],
}
# What only one family can express.
SOME = {
    ("opt", "patterns"): [
        "adapter=lora", "adapter.rank=4", "adapter.rank_pattern={v_proj: 2}",
        "adapter.alpha_pattern={q_proj: 7}",
    ],
    ("gpt2", "patterns of the rank alone"): [
        "adapter=lora", "adapter.rank=4", "adapter.rank_pattern={c_fc: 2}", "targets=all_linear",
    ],
    ("opt", "oft"): ["adapter=oft", "adapter.block_size=8", "targets=all_linear"],
    ("llama", "oft, exact"): ["adapter=oft", "adapter.block_size=8", "adapter.cayley_terms=0"],
    ("opt", "dora, embedding"): ["adapter=dora", "targets.modules=[embed_tokens,fc1]"],
    ("opt", "embedding"): ["adapter=lora", "adapter.rank=4", "targets.modules=[embed_tokens,fc1]"],
    ("gpt2", "head"): ["adapter=lora", "adapter.rank=4", "targets.modules=[lm_head,c_attn]"],
    ("llama", "one block"): ["adapter=lora", "adapter.rank=4", "targets.layers=[1]"],
    ("llama", "vera without projections"): [
        "adapter=vera", "adapter.rank=8", "adapter.save_projection=false",
    ],
}  # fmt: skip
NAMED = {variant_of(kind) for kind in (*OURS, *(kind for _, kind in SOME))}
OURS |= {
    name: [f"adapter={name}", "targets=all_linear"]
    for name in structures_in_peft()
    if name not in NAMED
}
CASES = [
    (family, kind)
    for family in ("opt", "gpt2", "llama")
    for kind in OURS
    if in_peft(variant_of(kind), family)
] + list(SOME)


@pytest.mark.case(67, T0)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_peft_loads_what_loratune_trained_to_equal_logits_without_a_warning(
    cli: CommandLine, bases: dict[str, Path], rows: Path, family: str, kind: str
) -> None:
    words = SOME.get((family, kind)) or OURS[kind]
    folder = train_here(cli, bases[family], rows, *words)
    theirs, ours = load_with_peft(bases[family], folder), load_here(bases[family], folder)
    T0.check(logits(theirs), logits(ours.model))
    from support.tiny_models import load_plain

    assert largest(logits(theirs), logits(load_plain(bases[family]))) > 1e-3


@pytest.mark.case(67, T0)
def test_peft_saves_back_the_very_tensors_that_loratune_wrote(
    cli: CommandLine, bases: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    folder = train_here(cli, bases["opt"], rows, *OURS["lora_plus"])
    load_with_peft(bases["opt"], folder).save_pretrained(tmp_path / "again")
    before, after = tensors_of(folder), tensors_of(tmp_path / "again")
    assert sorted(before) == sorted(after)
    for name, tensor in before.items():
        T0.check(after[name], tensor, name)


@pytest.mark.case(55, T1)
def test_veras_alpha_is_folded_into_lambda_b_and_peft_computes_the_same(
    cli: CommandLine, bases: dict[str, Path], rows: Path
) -> None:
    folder = train_here(cli, bases["llama"], rows, *OURS["vera"], "adapter.alpha=24")
    assert "alpha" not in json.loads((folder / "adapter_config.json").read_text())
    theirs = logits(load_with_peft(bases["llama"], folder))
    T1.check(logits(load_here(bases["llama"], folder).model), theirs)


def test_the_configuration_names_everything_that_other_servers_read(
    cli: CommandLine, bases: dict[str, Path], rows: Path
) -> None:
    folder = train_here(cli, bases["gpt2"], rows, *OURS["lora"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["target_modules"] == ["c_attn"] and config["fan_in_fan_out"] is True
    assert config["base_model_name_or_path"] == str(bases["gpt2"])
    assert config["inference_mode"] is True and config["use_rslora"] is False
