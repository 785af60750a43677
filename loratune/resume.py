"""Find the checkpoint to continue from, and refuse to continue into something else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratune import files
from loratune.checkpoint import (
    MANIFEST,
    Checkpoint,
    load_checkpoint,
    newest_verified,
    step_of,
)
from loratune.config.schema import RunConfig
from loratune.console import say
from loratune.drift import fact_changes, recipe_changes, refuse
from loratune.errors import CheckpointError, ConfigError
from loratune.run_dir import RunDir

AUTO = "auto"
_FACTS = ("base", "tokenizer", "data", "projection", "processes")


def resumed_run_folder(resume: str) -> Path:
    """The run folder that ``resume=DIR`` means: the folder itself, or a checkpoint's run."""
    path = Path(resume)
    if path.parent.name == "checkpoints":
        return path.parent.parent
    return path


def check_resume(config: RunConfig) -> None:
    """``resume=auto`` needs to know which folder; ``resume=DIR`` must be one.

    Raises:
        ConfigError: if it cannot be told.
    """
    if config.resume == AUTO and config.out is None:
        raise ConfigError(
            "resume=auto needs the run's folder", where="resume", fix="set out=DIR, or resume=DIR"
        )
    if config.resume not in (None, AUTO) and not Path(str(config.resume)).is_dir():
        raise ConfigError(
            "no such folder", where=f"resume={config.resume}", fix="name a run or checkpoint folder"
        )


def find_checkpoint(config: RunConfig, run_dir: RunDir) -> Checkpoint | None:
    """The checkpoint to continue from; ``None`` starts afresh.

    Damaged newer checkpoints are named and skipped.

    Raises:
        BusyError: if the folder holds an earlier run and nobody asked to resume it.
        CheckpointError: if the named checkpoint, or every published one, is damaged.
    """
    if config.resume is None:
        run_dir.refuse_occupied()
        return None
    files.remove_leftovers(run_dir.path)
    files.remove_leftovers(run_dir.checkpoints)
    if config.resume != AUTO and Path(config.resume).parent.name == "checkpoints":
        return load_checkpoint(Path(config.resume))
    path, skipped = newest_verified(run_dir.checkpoints)
    if path is None:
        if config.resume != AUTO:
            raise CheckpointError(
                "no checkpoint to resume", where=str(run_dir.path), fix="start afresh without resume"
            )
        return None
    for line in skipped:
        say(f"skipped {line}; resuming {path.name}")
    return load_checkpoint(path)


def refuse_drift(
    checkpoint: Checkpoint, facts: Mapping[str, Any], config: RunConfig
) -> list[str]:
    """Compare what the checkpoint was made of with what is there now.

    Returns the changes that ``allow_drift`` lets through, to be recorded.

    Raises:
        CheckpointError: one line ``key: saved → now`` for every other change.
    """
    saved = checkpoint.facts
    changes = [
        *recipe_changes(saved["recipe"], facts["recipe"]),
        *fact_changes(saved, facts, _FACTS),
    ]
    accepted = refuse(changes, config.allow_drift, where=str(checkpoint.path / MANIFEST))
    for line in accepted:
        say(f"drift allowed: {line}")
    for change in fact_changes(saved.get("versions", {}), facts["versions"], ("torch", "transformers")):
        say(f"warning: {change}; the same bytes as an uninterrupted run are not promised")
    return accepted


def describe(checkpoint: Checkpoint) -> str:
    """``resuming step 12``."""
    return f"resuming after step {step_of(checkpoint.path)}"
