"""What a newer loratune wrote is neither read, nor skipped, nor set aside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loratune import files
from loratune.errors import CheckpointError, ModelError
from loratune.runs.checkpoint import (
    checkpoint_path,
    newest_verified,
    rotate,
    save_checkpoint,
    set_aside_later,
)
from loratune.runs.provenance import merged_before


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Two checkpoints, the later one in format 99."""
    for step in (1, 2):
        tensors = {"adapter": {"a": torch.ones(2)}}
        save_checkpoint(tmp_path, step, tensors, {"step": step}, {})
    path = checkpoint_path(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("seal")
    files.write_sealed_json(path / "manifest.json", {**manifest, "format": 99})
    return tmp_path


def test_resuming_stops_at_it_with_the_formats(checkpoints: Path) -> None:
    with pytest.raises(CheckpointError, match=r"newer loratune \(format 99; .* up to 1") as caught:
        newest_verified(checkpoints)
    assert caught.value.exit_code == 6


def test_nothing_moves_or_removes_it(checkpoints: Path) -> None:
    with pytest.raises(CheckpointError):
        rotate(checkpoints, 1, ())
    with pytest.raises(CheckpointError):
        set_aside_later(checkpoints, 1)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000001", "step_000002"]


def test_an_adapter_of_a_newer_format_is_named(tmp_path: Path) -> None:
    from loratune.adapter_files.peft_format import read_adapter

    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "loratune.json").write_text('{"format": 2}')  # sealed in whichever way
    with pytest.raises(ModelError, match="written by a newer loratune") as caught:
        read_adapter(tmp_path)
    assert caught.value.exit_code == 4


def test_a_base_that_was_merged_is_recognised(tmp_path: Path) -> None:
    assert merged_before(tmp_path) is None
    record = {"base": "b", "adapters": ["a"]}
    files.write_sealed_json(tmp_path / "merge_report.json", {"format": 1, **record, "more": 1})
    assert merged_before(tmp_path) == record
    (tmp_path / "merge_report.json").write_text("{}")
    assert merged_before(tmp_path) == {"base": None, "adapters": None}
