"""Find the checkpoint to continue from, and refuse to continue into something else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratune import files
from loratune.config.convert import read_recipe
from loratune.config.schema import RunConfig
from loratune.console import say
from loratune.errors import CheckpointError, ConfigError
from loratune.runs import processes
from loratune.runs.checkpoint import (
    MANIFEST,
    Checkpoint,
    load_checkpoint,
    newest_verified,
)
from loratune.runs.drift import check_drift, fact_changes, recipe_changes
from loratune.runs.records import recipe_record
from loratune.runs.run_dir import OUTPUTS, RunDir, fresh_folder

AUTO = "auto"
_FACTS = ("base", "tokenizer", "data", "projection", "processes")
_COMPUTING = ("torch", "transformers")


def resumed_run_folder(resume: str) -> Path:
    """The run folder that ``resume=DIR`` means: the folder itself, or a checkpoint's run."""
    path = Path(resume)
    if path.parent.name == "checkpoints":
        return path.parent.parent
    return path


def run_folder(config: RunConfig) -> Path:
    """The folder that a run of ``config`` uses; a fresh one where none is named."""
    if config.resume not in (None, AUTO):
        return resumed_run_folder(str(config.resume))
    return Path(config.out) if config.out else fresh_folder(OUTPUTS / config.name)


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

    Damaged newer checkpoints are named and skipped.  The main process looks and tidies up; the
    others read what it found.

    Raises:
        CheckpointError: if the named checkpoint, or every published one, is damaged.
    """
    found = _look(config, run_dir) if processes.is_main() else None
    path = processes.broadcast(None if found is None else str(found))
    return None if path is None else load_checkpoint(Path(path))


def _look(config: RunConfig, run_dir: RunDir) -> Path | None:
    for folder in (run_dir.path, run_dir.checkpoints):
        files.remove_leftovers(folder)
    if config.resume is None:
        return None
    if config.resume != AUTO and Path(config.resume).parent.name == "checkpoints":
        return Path(config.resume)
    path, skipped = newest_verified(run_dir.checkpoints)
    if path is None and config.resume != AUTO:
        raise CheckpointError(
            "no checkpoint to resume", where=str(run_dir.path), fix="start afresh without resume"
        )
    for line in skipped:
        say(f"skipped {line}; resuming {path.name if path else 'nothing'}")
    return path


def is_complete(config: RunConfig, run_dir: RunDir) -> bool:
    """Whether the run that lies here has done all that the recipe asks.

    A recipe that asks for something else, for instance more steps, is drift: refused, or, where
    ``allow_drift`` names the key, reason enough to go on.

    Raises:
        CheckpointError: one line ``key: saved → now`` for every change that is not allowed.
    """
    if not run_dir.summary.is_file():
        return False
    try:
        done = files.read_json(run_dir.summary)["stages"]
        saved = read_recipe(run_dir.recipe)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    changes = recipe_changes(saved, recipe_record(config))
    check_drift(changes, config.allow_drift, where=str(run_dir.recipe))
    return not changes and set(map(str, config.stages)) <= set(done)


def refuse_drift(checkpoint: Checkpoint, facts: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Compare what the checkpoint was made of with what is there now.

    Returns the changes that ``allow_drift`` lets through, and other versions of what computes,
    to be recorded.

    Raises:
        CheckpointError: one line ``key: saved → now`` for every other change.
    """
    saved = checkpoint.facts
    changes = [
        *recipe_changes(saved["recipe"], facts["recipe"]),
        *fact_changes(saved, facts, _FACTS),
    ]
    accepted = check_drift(changes, config.allow_drift, where=str(checkpoint.path / MANIFEST))
    versions = fact_changes(saved.get("versions", {}), facts["versions"], _COMPUTING)
    if processes.is_main():
        for line in accepted:
            say(f"drift allowed: {line}")
        for change in versions:
            say(f"warning: {change}; the same bytes as an uninterrupted run are no longer promised")
    return [*accepted, *map(str, versions)]
