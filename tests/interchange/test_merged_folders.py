"""``loratune merge``: the folder it writes, loaded by plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import CommandLine
from support.peft_oracle import lora_config
from support.tiny_models import (
    EMBEDDING,
    FAMILIES,
    load_plain,
    logits,
    save_base,
    tiny_gpt2,
    tiny_opt,
)
from support.tolerance import T0, T1, T2, largest

from interchange.adapters import (
    load_here,
    peft_configs,
    rewrite_tensors,
    tensors_of,
    write_with_peft,
)
from loratune import files

ENDS = {"input": 0, "output": 1, "both": 2}


def merge_words(base: Path, *folders: Path, out: str = "merged") -> list[str]:
    names = [str(folder) for folder in folders]
    adapter = names[0] if len(names) == 1 else f"[{','.join(names)}]"
    return ["merge", f"model.path={base}", f"adapter_path={adapter}", f"out={out}"]


@pytest.mark.case(56, T2)
@pytest.mark.case(62, T1)
@pytest.mark.parametrize(
    ("family", "kind"),
    [("opt", "patterns"), ("gpt2", "rslora"), ("llama", "vera"), ("llama", "embedding")],
)
def test_the_merged_folder_gives_base_plus_adapters_logits(
    cli: CommandLine, bases: dict[str, Path], tmp_path: Path, family: str, kind: str
) -> None:
    base = bases[family]
    folder = write_with_peft(base, peft_configs(family)[kind], tmp_path / "adapter")
    cli.succeeds(*merge_words(base, folder))
    merged, expected = (
        logits(load_plain(tmp_path / "merged")),
        logits(load_here(base, folder).model),
    )
    T2.check(merged, expected)
    assert largest(merged, logits(load_plain(base))) > 1e-2
    report = files.read_sealed_json(tmp_path / "merged" / "merge_report.json")
    assert {m["module"] for m in report["modules"]} == set(load_here(base, folder).adapters)
    assert all(module["delta_kept"] > 0.999 for module in report["modules"])
    assert report["logits"]["max_difference"] < 1e-4
    _weights_are_base_plus_delta(base, tmp_path / "merged", load_here(base, folder))


def _weights_are_base_plus_delta(base: Path, merged: Path, wrapped: Any) -> None:
    before, after = load_plain(base).state_dict(), load_plain(merged).state_dict()
    for name, layer in wrapped.adapters.items():
        T1.check(after[f"{name}.weight"], before[f"{name}.weight"] + layer.delta_weight().detach())
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in wrapped.adapters:
            T0.check(after[name], tensor, name)


@pytest.mark.case(63, T2)
@pytest.mark.parametrize("family", ["opt", "gpt2"])
@pytest.mark.parametrize("ends", ["input", "output", "both"])
def test_tied_embeddings_part_in_the_merged_folder_and_the_logits_stay(
    cli: CommandLine, bases: dict[str, Path], tmp_path: Path, family: str, ends: str
) -> None:
    base = bases[family]
    targets = {"input": [EMBEDDING[family]], "output": ["lm_head"]}.get(
        ends, [EMBEDDING[family], "lm_head"]
    )
    config = lora_config(r=4, lora_alpha=8, target_modules=targets)
    folder = write_with_peft(base, config, tmp_path / "adapter")
    expected = logits(load_here(base, folder).model)
    cli.succeeds(*merge_words(base, folder))
    merged = load_plain(tmp_path / "merged")
    T2.check(logits(merged), expected)
    assert merged.config.tie_word_embeddings is False
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    assert head.weight.data_ptr() != embedding.weight.data_ptr()
    assert not torch.equal(head.weight, embedding.weight)
    assert files.read_sealed_json(tmp_path / "merged" / "merge_report.json")["untied"] is True


def test_untouched_tied_embeddings_stay_tied(
    cli: CommandLine, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_with_peft(bases["opt"], peft_configs("opt")["lora"], tmp_path / "adapter")
    cli.succeeds(*merge_words(bases["opt"], folder))
    assert load_plain(tmp_path / "merged").config.tie_word_embeddings is True
    assert sorted(load_file(tmp_path / "merged" / "model.safetensors")) == sorted(
        load_file(bases["opt"] / "model.safetensors")
    )


@pytest.mark.case(60, T0)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", ["auto", "float32", "other"])
def test_half_precision_bases_merge_in_fp32_and_are_rounded_once(
    cli: CommandLine, tmp_path: Path, dtype: torch.dtype, wanted: str
) -> None:
    base = save_base(tmp_path / "base", tiny_opt().to(dtype))
    folder = write_with_peft(base, peft_configs("opt")["lora"], tmp_path / "adapter")
    other = "float16" if dtype is torch.bfloat16 else "bfloat16"
    choice = other if wanted == "other" else wanted
    cli.succeeds(*merge_words(base, folder), f"merge.dtype={choice}")
    out = dtype if choice == "auto" else getattr(torch, choice)
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    wrapped = load_here(base, folder)
    for name, layer in wrapped.adapters.items():
        expected = (before[f"{name}.weight"].float() + layer.delta_weight().detach()).to(out)
        T0.check(after[f"{name}.weight"], expected, name)
    assert {tensor.dtype for tensor in after.values()} == {out}
    named = json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"]
    assert named == str(out).removeprefix("torch.")
    report = files.read_sealed_json(tmp_path / "merged" / "merge_report.json")
    kept = [module["delta_kept"] for module in report["modules"]]
    assert len(kept) == len(wrapped.adapters) and all(0.8 < share < 1.2 for share in kept)
    rounded = max(module["residual"] for module in report["modules"])
    assert rounded < 1e-5 if out is torch.float32 else rounded > 1e-4


@pytest.mark.case(61, T0)
def test_several_adapters_are_summed_in_fp32_once(cli: CommandLine, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tiny_opt().to(torch.bfloat16))
    configs = peft_configs("opt")
    folders = [
        write_with_peft(base, configs[kind], tmp_path / kind) for kind in ("lora", "rslora", "vera")
    ]
    cli.succeeds(*merge_words(base, *folders))
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    loaded = [load_here(base, folder).adapters for folder in folders]
    several = 0
    for name in sorted({name for adapters in loaded for name in adapters}):
        deltas = [a[name].delta_weight().detach().float() for a in loaded if name in a]
        total = before[f"{name}.weight"].float() + torch.stack(deltas).sum(dim=0)
        T0.check(after[f"{name}.weight"], total.to(torch.bfloat16), name)
        several += len(deltas) > 1
    assert several > 0
    report = files.read_sealed_json(tmp_path / "merged" / "merge_report.json")
    assert len(report["adapters"]) == 3


@pytest.mark.case(61, T2)
def test_merging_one_after_the_other_agrees_with_merging_at_once(
    cli: CommandLine, bases: dict[str, Path], tmp_path: Path
) -> None:
    configs, base = peft_configs("opt"), bases["opt"]
    one = write_with_peft(base, configs["lora"], tmp_path / "one")
    two = write_with_peft(base, configs["patterns"], tmp_path / "two")
    cli.succeeds(*merge_words(base, one, two, out="at-once"))
    cli.succeeds(*merge_words(base, one, out="first"))
    cli.succeeds(*merge_words(tmp_path / "first", two, out="then"))
    T2.check(logits(load_plain(tmp_path / "then")), logits(load_plain(tmp_path / "at-once")))


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_sharded_base_stays_sharded_with_an_index_that_is_right(
    cli: CommandLine, tmp_path: Path, family: str
) -> None:
    base = save_base(tmp_path / "base", FAMILIES[family](), max_shard_size="12KB")
    targets = [EMBEDDING[family], "q_proj"]
    config = lora_config(r=4, lora_alpha=8, target_modules=targets)
    folder = write_with_peft(base, config, tmp_path / "adapter")
    cli.succeeds(*merge_words(base, folder))
    merged = tmp_path / "merged"
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in merged.glob("*.safetensors"))
    assert len(shards) > 1 and set(index["weight_map"].values()) == set(shards)
    size = 0
    for shard in shards:
        tensors = load_file(merged / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == set(tensors)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == size
    T2.check(logits(load_plain(merged)), logits(load_here(base, folder).model))


def test_a_base_whose_file_leaves_out_the_models_prefix_merges_too(
    cli: CommandLine, tmp_path: Path
) -> None:
    model = tiny_gpt2()
    save_base(tmp_path / "base", model)
    model.transformer.save_pretrained(tmp_path / "base")  # names as on the hub: h.0..., wte...
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "base" / "model.safetensors")
    adapter = lora_config(r=4, lora_alpha=8, target_modules=["c_attn", "lm_head"])
    folder = write_with_peft(tmp_path / "base", adapter, tmp_path / "adapter")
    cli.succeeds(*merge_words(tmp_path / "base", folder))
    expected = logits(load_here(tmp_path / "base", folder).model)
    T2.check(logits(load_plain(tmp_path / "merged")), expected)


@pytest.mark.case(58, T0)
def test_a_nan_adapter_is_refused_and_nothing_changes(
    cli: CommandLine, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["opt"]
    folder = write_with_peft(base, peft_configs("opt")["lora"], tmp_path / "adapter")
    tensors = tensors_of(folder)
    name = next(iter(tensors))
    broken = tensors[name].clone()
    broken[0, 0] = float("nan")
    rewrite_tensors(folder, {**tensors, name: broken})
    before = files.sha256_file(base / "model.safetensors")
    assert "NaN" in cli.refuses(*merge_words(base, folder))
    assert files.sha256_file(base / "model.safetensors") == before
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_overflows_the_output_dtype_is_refused(
    cli: CommandLine, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", tiny_opt().to(torch.float16))
    folder = write_with_peft(base, peft_configs("opt")["lora"], tmp_path / "adapter")
    rewrite_tensors(folder, {name: tensor * 1e3 for name, tensor in tensors_of(folder).items()})
    said = cli.refuses(*merge_words(base, folder))
    assert "infinite" in said and "merge.dtype=float32" in said
    cli.succeeds(*merge_words(base, folder), "merge.dtype=float32", "merge.verify=weights")


@pytest.mark.case(59, T0)
def test_merging_the_same_adapter_into_its_own_result_is_refused(
    cli: CommandLine, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_with_peft(bases["opt"], peft_configs("opt")["lora"], tmp_path / "adapter")
    cli.succeeds(*merge_words(bases["opt"], folder))
    said = cli.refuses(*merge_words(tmp_path / "merged", folder, out="twice"))
    assert "already merged" in said and not (tmp_path / "twice").exists()


def test_a_merge_that_loses_too_much_to_rounding_can_be_refused(
    cli: CommandLine, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", tiny_opt().to(torch.bfloat16))
    folder = write_with_peft(base, peft_configs("opt")["lora"], tmp_path / "adapter")
    small = {name: t * 1e-3 for name, t in tensors_of(folder).items()}
    rewrite_tensors(folder, small)
    words = [*merge_words(base, folder), "merge.min_delta_kept=0.9", "merge.verify=weights"]
    assert "rounding kept only" in cli.refuses(*words)
    cli.succeeds(*words, "merge.dtype=float32")
