"""A merge and its verification ask one plan which tensor comes from which."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import save_base, tiny_opt
from torch import nn

from loratune.adapter_files.peft_format import read_adapter, write_adapter
from loratune.adapters.registry import config_class
from loratune.config.schema import MergeConfig, TargetsConfig
from loratune.files import read_sealed_json, write_sealed_json
from loratune.merging.plan import MergePlan
from loratune.runs.manifest import describe_files
from loratune.runs.run_dir import MERGE_REPORT
from loratune.stages.merge import merge
from loratune.surgery import wrap_model
from loratune.verify.checks import Base, Check
from loratune.verify.merged import check_merged

HEAD, EMBEDDING = "lm_head.weight", "model.decoder.embed_tokens.weight"
NORM = "model.decoder.final_layer_norm"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied base; an adapter on its head alone, with a norm trained in full; the two merged."""
    here = tmp_path_factory.mktemp("world")
    save_base(here / "base", tiny_opt())
    targets = TargetsConfig(modules=["lm_head"], modules_to_save=[NORM])
    wrapped = wrap_model(tiny_opt(), config_class("lora")(rank=3), targets)
    torch.manual_seed(1)
    for parameter in wrapped.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    (here / "adapter").mkdir()
    write_adapter(here / "adapter", wrapped, {}, "base")
    merge([read_adapter(here / "adapter")], here / "base", here / "merged", MergeConfig())
    return here


def test_a_tied_head_that_is_adapted_comes_from_the_embedding(world: Path) -> None:
    plan = MergePlan([read_adapter(world / "adapter")], world / "base")
    assert plan.parted == {HEAD, EMBEDDING} and HEAD not in plan.entries
    assert plan.sources[HEAD] == plan.entries[EMBEDDING]
    assert plan.sources.keys() == {*plan.entries, HEAD}
    assert list(plan.layers) == [HEAD]
    assert plan.trained.keys() == {f"{NORM}.weight", f"{NORM}.bias"}


def verified(world: Path, merged: Path) -> list[Check]:
    return check_merged(merged, Base(world / "base"), [world / "adapter"])


def test_the_merge_is_what_the_plan_says(world: Path) -> None:
    assert [check.problem for check in verified(world, world / "merged") if check.problem] == []


@pytest.mark.parametrize("name", [HEAD, EMBEDDING, f"{NORM}.bias", "of.nothing"])
def test_a_tensor_that_is_not_as_planned_is_found(world: Path, tmp_path: Path, name: str) -> None:
    merged = Path(shutil.copytree(world / "merged", tmp_path / "merged"))
    tensors = load_file(merged / "model.safetensors")
    tensors[name] = tensors[name] + 1 if name in tensors else torch.ones(3)
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    report = read_sealed_json(merged / MERGE_REPORT)
    report["files"] |= describe_files([merged / "model.safetensors"])
    write_sealed_json(merged / MERGE_REPORT, report)
    [problem] = [check.problem for check in verified(world, merged) if check.problem]
    assert f"'{name}'" in problem
