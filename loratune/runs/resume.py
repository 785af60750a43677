"""Find the checkpoint to continue from, and check that it belongs to what is run now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratune import files
from loratune.config.convert import read_recipe
from loratune.config.mixture import SOURCES
from loratune.config.schema import RunConfig
from loratune.console import say
from loratune.errors import CheckpointError
from loratune.runs import processes
from loratune.runs.checkpoint import MANIFEST, Checkpoint, load_checkpoint, newest_verified
from loratune.runs.drift import check_drift, fact_changes, recipe_changes
from loratune.runs.records import recipe_record
from loratune.runs.run_dir import AUTO, RunDir, names_checkpoint

_FACTS = ("base", "tokenizer", "data", "projection", "processes")
_COMPUTING = ("torch", "transformers")
_ENCODING = ("data", "tokenizer")
"""What explains, besides the recipe, that rows are encoded otherwise."""


def find_checkpoint(config: RunConfig, run_dir: RunDir) -> Checkpoint | None:
    """The checkpoint to continue from; ``None`` starts afresh.

    Damaged newer checkpoints are named and skipped.  The main process looks and tidies up; the
    others read the one it chose.

    Raises:
        CheckpointError: if the named checkpoint, or every published one, is damaged.
    """
    chosen = _choose(config, run_dir) if processes.is_main() else None
    path = processes.broadcast(None if chosen is None else str(chosen))
    return None if path is None else load_checkpoint(Path(path))


def _choose(config: RunConfig, run_dir: RunDir) -> Path | None:
    for folder in (run_dir.path, run_dir.checkpoints):
        files.remove_leftovers(folder)
    if config.resume is None:
        return None
    if config.resume != AUTO and names_checkpoint(config.resume):
        return Path(config.resume)
    path, skipped = newest_verified(run_dir.checkpoints)
    if path is None and config.resume != AUTO:
        raise CheckpointError(
            "no checkpoint to resume", where=str(run_dir.path), fix="start afresh without resume"
        )
    for line in skipped:
        say(f"skipped {line}; resuming {path.name if path else 'nothing'}")
    return path


def is_complete(config: RunConfig) -> bool:
    """Whether the run to be resumed has done all that the recipe asks.

    A recipe that asks for something else, for instance more steps, is drift: an error, or, where
    ``allow_drift`` names the key, reason enough to go on.

    Raises:
        CheckpointError: one line ``key: saved → now`` for every change that is not allowed.
    """
    if not (config.resume and config.out):
        return False
    run_dir = RunDir(Path(config.out))
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


def recorded_clock(checkpoint: Checkpoint | None) -> str | None:
    """The moment that the run's chat template took for now, if it asked."""
    return None if checkpoint is None else checkpoint.facts.get("clock")


def resumed_facts(
    checkpoint: Checkpoint | None, facts: dict[str, Any], config: RunConfig
) -> dict[str, Any]:
    """The facts of a run that goes on from ``checkpoint``, with what drifted since it was saved.

    Raises:
        CheckpointError: one line ``key: saved → now`` for every change that is not allowed.
    """
    if checkpoint is None:
        return facts
    processes.say_once(f"resuming after step {checkpoint.step}")
    earlier = checkpoint.facts.get("drift", [])
    return {**facts, "drift": [*earlier, *_check_drift(checkpoint, facts, config)]}


def _check_drift(checkpoint: Checkpoint, facts: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Compare what the checkpoint was made of with what is there now.

    Returns the changes that ``allow_drift`` lets through, and other versions of what computes,
    to be recorded.
    """
    saved = checkpoint.facts
    sources = sorted(key for key in {**saved, **facts} if key.startswith(SOURCES))
    changes = [
        *recipe_changes(saved["recipe"], facts["recipe"]),
        *fact_changes(saved, facts, sources),
    ]
    # The data as a whole differ with any source: what names the source says more.
    named = any(change.key.startswith(SOURCES) for change in changes)
    changes += fact_changes(saved, facts, [key for key in _FACTS if key != "data" or not named])
    if not any(change.key in _ENCODING or change.key.startswith("data.") for change in changes):
        changes += fact_changes(saved, facts, ("encoded",))
    accepted = check_drift(changes, config.allow_drift, where=str(checkpoint.path / MANIFEST))
    versions = fact_changes(saved.get("versions", {}), facts["versions"], _COMPUTING)
    processes.say_once(*(f"drift allowed: {line}" for line in accepted))
    lost = "the same bytes as an uninterrupted run are no longer promised"
    processes.say_once(*(f"warning: {change}; {lost}" for change in versions))
    return [*accepted, *map(str, versions)]
