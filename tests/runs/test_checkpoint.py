"""Checkpoints of several files: as much as fits into each, and all of it back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratune.errors import CheckpointError
from loratune.runs import checkpoint
from loratune.runs.checkpoint import load_checkpoint, save_checkpoint
from loratune.verify.run import check_checkpoint

ADAPTER = {f"layer{n}.weight": torch.full((10,), float(n)) for n in range(5)}


def saved(folder: Path) -> Path:
    save_checkpoint(folder, 3, {"adapter": ADAPTER, "rng": {"0|torch": torch.ones(2)}}, {}, {})
    return folder / "step_000003"


def test_what_is_too_large_for_one_file_is_spread_and_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 80)
    path = saved(tmp_path)
    parts = sorted(file.name for file in path.glob("adapter*"))
    assert parts == [f"adapter-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    assert (path / "rng.safetensors").is_file()
    read = load_checkpoint(path).tensors
    assert read.keys() == {"adapter", "rng"}
    assert read["adapter"].keys() == ADAPTER.keys()
    assert all(torch.equal(read["adapter"][name], ADAPTER[name]) for name in ADAPTER)
    assert not [check for check in check_checkpoint(path) if check.problem]
    (path / parts[1]).unlink()
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        load_checkpoint(path)


def test_what_fits_into_one_file_is_one_file(tmp_path: Path) -> None:
    names = {file.name for file in saved(tmp_path).glob("*.safetensors")}
    assert names == {"adapter.safetensors", "rng.safetensors"}
