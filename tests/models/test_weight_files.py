"""One opinion about which weights count, where a folder holds them twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import CommandLine
from support.tiny_models import save_base, tiny_opt

from loratune.errors import LoratuneError, ModelError
from loratune.models.fingerprint import base_fingerprint
from loratune.models.weights import INDEX, SINGLE, weight_files


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder of shards with their index."""
    folder = save_base(tmp_path / "base", tiny_opt(), max_shard_size="10KB")
    assert (folder / INDEX).is_file() and not (folder / SINGLE).exists()
    return folder


def add_single(folder: Path, change: float = 0.0) -> None:
    """One file with all tensors, the last of them moved by ``change``."""
    shards = (load_file(path) for path in sorted(folder.glob("model-*.safetensors")))
    tensors = {name: tensor for shard in shards for name, tensor in shard.items()}
    tensors[max(tensors)] += change
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def test_a_single_file_that_agrees_with_the_shards_changes_nothing(base: Path) -> None:
    before, files = base_fingerprint(base), weight_files(base)
    add_single(base)
    assert weight_files(base) == files and base_fingerprint(base) == before


@pytest.mark.parametrize("kind", ["value", "shape", "name"])
def test_files_that_disagree_are_refused_by_name(base: Path, kind: str) -> None:
    add_single(base, 0.5 if kind == "value" else 0.0)
    tensors = load_file(base / SINGLE)
    last = max(tensors)
    if kind == "shape":
        tensors[last] = torch.zeros(3)
    if kind == "name":
        tensors["other.weight"] = tensors.pop(last)
    save_file(tensors, base / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        weight_files(base)
    line = str(caught.value)
    assert SINGLE in line and INDEX in line and "disagree" in line
    assert last in line or "other.weight" in line


def test_a_file_that_changes_is_compared_again(base: Path) -> None:
    add_single(base)
    weight_files(base)
    add_single(base, 0.5)
    with pytest.raises(ModelError, match="disagree"):
        weight_files(base)


def test_training_never_starts_on_files_that_disagree(cli: CommandLine, base: Path) -> None:
    add_single(base, 0.5)
    words = (
        "recipe=smoke",
        f"model.path={base}",
        "data=local",
        "data.path=rows.jsonl",
        "data.eval_fraction=0",
    )
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    error = cli.refuses("train", *words, "stages=[train]", "out=out")
    assert "disagree" in error and not Path("out").exists()


def test_an_index_of_shards_that_are_gone_names_the_file_that_is_there(base: Path) -> None:
    add_single(base)
    for path in base.glob("model-*.safetensors"):
        path.unlink()
    names = set(json.loads((base / INDEX).read_text())["weight_map"].values())
    with pytest.raises(LoratuneError) as caught:
        weight_files(base)
    assert f"remove {INDEX} if {SINGLE} is whole" in str(caught.value)
    assert min(names) in str(caught.value)
