"""A run that is still going may take a checkpoint away while it is verified."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from loratune.runs.checkpoint import save_checkpoint
from loratune.verify import run as verified
from loratune.verify.checks import Check


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", step, {"adapter": {"a": torch.ones(2)}}, {}, {})
    return tmp_path


@pytest.mark.parametrize("moment", ["before", "while", "after"])
def test_a_checkpoint_that_is_rotated_away_is_skipped(
    run: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    first = run / "checkpoints" / "step_000001"
    look = verified.check_checkpoint

    def rotating(path: Path, base: object = None) -> list[Check]:
        if path == first and moment == "while":
            (path / "adapter.safetensors").unlink()
            checks = look(path)
        if path == first and path.exists() and moment != "after":
            shutil.rmtree(path)
        checks = look(path)
        if path == first and moment == "after" and path.exists():
            shutil.rmtree(path)
            raise FileNotFoundError(path)
        return checks

    monkeypatch.setattr(verified, "check_checkpoint", rotating)
    checks = verified.check_run(run)
    assert not [check for check in checks if check.problem]
    assert any("step_000002" in check.item for check in checks)


def test_a_checkpoint_that_stays_and_is_damaged_is_still_found(run: Path) -> None:
    (run / "checkpoints" / "step_000001" / "state.json").unlink()
    problems = [check.item for check in verified.check_run(run) if check.problem]
    assert problems == ["checkpoints/step_000001/state.json"]
