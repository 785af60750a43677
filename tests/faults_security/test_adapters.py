"""Faulty adapters and merges."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .test_models import duplicate_key, sharded
from .world import Tensors, World, refused, unchanged, update_json

TENSORS = "adapter_model.safetensors"


def only(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if part in name}


def each(change: Callable[[torch.Tensor], torch.Tensor], part: str = "") -> Any:
    return lambda tensors: {k: change(v) if part in k else v for k, v in tensors.items()}


def less_one(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if name != sorted(tensors)[0]}


def twice(folder: Path) -> None:
    duplicate_key(folder / TENSORS)


def cut(folder: Path) -> None:
    os.truncate(folder / TENSORS, 20_000)


def no_file(folder: Path) -> None:
    (folder / TENSORS).unlink()


def text(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "adapter_config.json").write_text(content)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        pytest.param({"tensors": less_one}, "lora_A", id="one-key"),
        pytest.param({"tensors": only("lora_A")}, "lora_B", id="all-of-B"),
        pytest.param({"tensors": lambda t: {}}, "no tensor", id="empty"),
        pytest.param({"tensors": each(lambda v: v[:0], "lora_A")}, "empty", id="zero-size"),
        pytest.param({"tensors": each(torch.zeros_like, "lora_B")}, "no effect", id="zero-effect"),
        pytest.param({"tensors": each(lambda v: v * float("nan"))}, "NaN", id="nan"),
        pytest.param({"tensors": each(lambda v: v.int())}, "floating", id="integers"),
        pytest.param({"config": {"r": 4}}, "[8, 128]", id="rank"),
        pytest.param({"config": {"r": "eight"}}, "eight", id="rank-text"),
        pytest.param({"config": {"r": 0}}, "rank", id="rank-zero"),
        pytest.param({"config": {"r": 10**9}}, "1,000,000,000", id="rank-huge"),
        pytest.param({"config": {"lora_alpha": 0}}, "alpha", id="alpha-zero"),
        pytest.param({"config": {"lora_alpha": 800}, "sealed": True}, "edited", id="alpha-edited"),
        pytest.param({"config": {"rank_pattern": [1]}}, "adapter_config.json", id="pattern-list"),
        pytest.param({"config": {"rank_pattern": {"q_proj": -3}}}, "-3", id="pattern-negative"),
        pytest.param({"config": {"alpha_pattern": {"q_proj": "x"}}}, "'x'", id="pattern-text"),
        pytest.param({"config": {"layers_to_transform": "x"}}, "layers_to_transform", id="layers"),
        pytest.param({"config": {"target_modules": ["gate_proj"]}}, "gate_proj", id="target"),
        pytest.param({"config": {"target_modules": []}}, "target", id="no-target"),
        pytest.param({"config": {"peft_type": "LOHA"}}, "LOHA", id="kind"),
        pytest.param({"config": {"use_dora": True}}, "lora_magnitude_vector", id="dora"),
        pytest.param({"config": {"use_qalora": True}}, "use_qalora", id="qalora"),
        pytest.param({"config": {"bias": "all"}}, "bias", id="bias"),
        pytest.param({"config": {"modules_to_save": ["nonsense"]}}, "nonsense", id="saved"),
        pytest.param({"edit": twice}, TENSORS, id="duplicate-key"),
        pytest.param({"edit": cut}, "truncated", id="truncated"),
        pytest.param({"edit": no_file}, TENSORS, id="no-tensors"),
        pytest.param({"edit": text("[]")}, "adapter_config.json", id="config-list"),
        pytest.param({"edit": text('{"r"')}, "adapter_config.json", id="config-broken"),
    ],
)
def test_a_merge_refuses_an_unusable_adapter(
    world: World, fault: dict[str, Any], named: str
) -> None:
    outcome = world.merge(world.new_adapter(**fault))
    refused(outcome, 7, named)
    assert world.left() == []


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        pytest.param({"tensors": less_one}, "lora_A", id="one-key"),
        pytest.param({"tensors": lambda t: {}}, "no tensor", id="empty"),
        pytest.param({"config": {"r": 4}}, "misshapen", id="rank"),
        pytest.param({"config": {"lora_alpha": 800}, "sealed": True}, "edited", id="edited"),
    ],
)
def test_continuing_from_an_unusable_adapter_is_refused(
    world: World, fault: dict[str, Any], named: str
) -> None:
    outcome = world.train(f"adapter_path={world.new_adapter(**fault)}")
    refused(outcome, 4, named)
    assert not (world.path / "out" / "adapter").exists()


def nudge(tensors: Tensors) -> Tensors:
    """One weight of another revision."""
    name = next(name for name in tensors if name.endswith("layers.2.fc1.weight"))
    tensors[name].view(-1)[7] += 1
    return tensors


def swap_two_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[100], list(vocabulary)[200]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("fault", "key"),
    [
        pytest.param({"tensors": nudge}, "base", id="base"),
        pytest.param({"edit": swap_two_tokens}, "tokenizer", id="tokenizer"),
    ],
)
def test_another_base_or_tokenizer_is_refused_by_fingerprint(
    world: World, fault: dict[str, Any], key: str
) -> None:
    other, adapter = world.new_base(**fault), world.new_adapter(sealed=True)
    refused(world.merge(adapter, base=other), 7, f"{key}: ", "→", f"allow_drift=[{key}]")
    assert world.left() == []
    words = ["recipe=smoke", f"adapter_path={adapter}", f"model.path={other}"]
    refused(world.cli("evaluate", *words), 6, f"{key}: ")
    allowed = world.merge(adapter, f"allow_drift=[{key}]", base=other)
    assert allowed.code == 0, allowed.err
    report = json.loads((world.path / "merged" / "merge_report.json").read_text())
    assert [line.partition(":")[0] for line in report["drift"]] == [key]


def test_an_adapter_is_merged_once(world: World) -> None:
    """The second merge onto its own result."""
    adapter = world.new_adapter(sealed=True)
    assert world.merge(adapter).code == 0
    merged = (world.path / "merged").rename(world.path / "base-merged")
    refused(world.merge(adapter, "allow_drift=[base]", base=merged), 7, "already merged")
    assert world.left() == []


def test_an_occupied_output_is_left_as_it_is(world: World) -> None:
    (world.path / "merged").mkdir()
    (world.path / "merged" / "mine.txt").write_text("mine")
    refused(world.merge(world.new_adapter(sealed=True)), 10, "already exists")
    assert unchanged(world.path / "merged") == {"mine.txt": b"mine"}


def test_wrong_merge_arithmetic_is_caught_before_anything_is_published(world: World) -> None:
    """The correction that is merged is not the one that the layer computes."""
    adapter = world.new_adapter(sealed=True)
    wrong_delta = ["scale@loratune.adapters.lora.module.LoRA.factors:1+"]
    refused(world.merge(adapter, faults=wrong_delta), 7, "self_attn")
    assert world.left() == []
    assert world.merge(adapter).code == 0


def test_a_vera_adapter_with_other_projections_is_refused(world: World) -> None:
    """An edited seed, edited bytes, and a generator that draws other numbers."""
    sealed = {"source": world.vera, "sealed": True}
    edited = world.new_adapter(config={"projection_prng_key": 5}, **sealed)
    refused(world.merge(edited), 7, "edited")
    moved = world.new_adapter(tensors=each(lambda v: v + 1, "vera_A"), **sealed)
    refused(world.merge(moved), 7, "edited")
    words = [f"adapter_path={world.vera / 'adapter'}", f"model.path={world.base}"]
    out = world.path / "compact"
    world.cli.succeeds("export", *words, "format=compact", f"out={out}")
    assert not any("vera_A" in name for name in load_file(out / TENSORS))
    assert world.merge(out).code == 0
    shutil.rmtree(world.path / "merged")
    other_numbers = ["scale@loratune.adapters.vera.module.SharedProjection.__init__:1+"]
    refused(world.merge(out, faults=other_numbers), 7, "shared matrices differ")
    assert world.left() == []


# -- the disk and the clock ----------------------------------------------------------------


@pytest.mark.parametrize(("name", "call"), [("rename", 1), ("fsync", 1), ("fsync", 4)])
def test_a_merge_killed_while_writing_leaves_nothing_and_can_be_repeated(
    world: World, name: str, call: int
) -> None:
    adapter, before = world.new_adapter(sealed=True), unchanged(world.base)
    assert world.merge(adapter, faults=[f"kill@os.{name}:{call}"]).code == -signal.SIGKILL
    assert not (world.path / "merged").exists()
    assert world.merge(adapter).code == 0
    assert unchanged(world.base) == before
    assert world.cli("verify", "merged").code == 0


@pytest.mark.parametrize(("name", "call"), [("fsync", 1), ("fsync", 3), ("rename", 1)])
def test_a_full_disk_during_a_merge_publishes_nothing(world: World, name: str, call: int) -> None:
    base = world.new_base(edit=sharded)
    adapter = world.new_adapter(sealed=True)
    full = [f"enospc@os.{name}:{call}+"]
    refused(world.merge(adapter, base=base, faults=full), 8, "No space", "free")
    assert world.left() == []


# -- rounding ------------------------------------------------------------------------------


def test_a_correction_lost_to_rounding_is_reported_and_can_be_refused(world: World) -> None:
    """A bf16 base and corrections far below its rounding."""
    small = world.new_adapter(tensors=each(lambda v: v * 1e-5, "lora_B"))
    outcome = world.merge(small, "merge.min_delta_kept=0.5")
    refused(outcome, 7, "rounding", "merge.dtype=float32")
    assert world.left() == []
    wide = world.merge(small, "merge.min_delta_kept=0.5", "merge.dtype=float32")
    assert wide.code == 0, wide.err
    report = json.loads((world.path / "merged" / "merge_report.json").read_text())
    assert report["delta_kept"] > 0.99


def test_what_an_adapter_says_of_its_base_is_never_followed(world: World) -> None:
    """A path, an address or a hub id in adapter_config.json."""
    for named in ("../../etc", "https://evil.example/x", "owner/model", "file:///etc"):
        adapter = world.new_adapter(config={"base_model_name_or_path": named})
        words = [f"adapter_path={adapter}", f"out={world.path / 'merged'}"]
        refused(world.cli("merge", *words), 2, "model.path", named)
    assert world.left() == []


def test_update_json_keeps_what_it_does_not_name(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1, "b": 2}')
    update_json(tmp_path / "x.json", {"b": 3})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1, "b": 3}
