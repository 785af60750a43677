"""Which ends of a process are worth another start, and what the next start resumes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loratune.adapters.registry import config_class
from loratune.config.schema import LaunchConfig, RunConfig
from loratune.errors import DataError, LoratuneError, Preempted, TrainingError
from loratune.pipeline import launch as launching
from loratune.runs.notices import LostProcessError, RelayedError, described

LOST = LostProcessError("process 1 died")


class Starts:
    """Takes the place of torch's launcher: notes every start and fails as it is told."""

    def __init__(self, *errors: LoratuneError) -> None:
        self.errors: Iterator[LoratuneError] = iter(errors)
        self.resumes: list[str | None] = []

    def __call__(self, config: RunConfig, run_id: str) -> None:
        self.resumes.append(config.resume)
        if (error := next(self.errors, None)) is not None:
            raise error


def config(out: Path, restarts: int) -> RunConfig:
    settings = LaunchConfig(nproc=2, max_restarts=restarts)
    return RunConfig(adapter=config_class("lora")(), out=str(out), launch=settings)


def test_lost_processes_are_started_again_from_the_newest_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    starts = Starts(LOST, RelayedError(described(LOST)))
    monkeypatch.setattr(launching, "_start", starts)
    launching.launch(config(tmp_path / "run", 2))
    assert starts.resumes == [None, "auto", "auto"]
    assert "process 1 died; restart 2 of 2" in capsys.readouterr().out


def test_after_the_last_restart_the_error_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    starts = Starts(LOST, LOST, LOST)
    monkeypatch.setattr(launching, "_start", starts)
    with pytest.raises(LostProcessError):
        launching.launch(config(tmp_path / "run", 1))
    assert len(starts.resumes) == 2


@pytest.mark.parametrize(
    "error",
    [
        RelayedError(described(DataError("a bad row"))),
        RelayedError(described(TrainingError("training diverged"))),
        RelayedError(described(Preempted("preempted at step 3, saved"))),
    ],
)
def test_what_a_process_says_itself_would_be_said_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: LoratuneError
) -> None:
    starts = Starts(error)
    monkeypatch.setattr(launching, "_start", starts)
    with pytest.raises(RelayedError):
        launching.launch(config(tmp_path / "run", 3))
    assert starts.resumes == [None]


def test_a_named_checkpoint_is_resumed_again_and_not_a_later_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000003"
    checkpoint.mkdir(parents=True)
    starts = Starts(LOST)
    monkeypatch.setattr(launching, "_start", starts)
    launching.launch(replace(config(tmp_path / "run", 1), out=None, resume=str(checkpoint)))
    assert starts.resumes == [str(checkpoint)] * 2
