"""Whether all processes of a run are about to do the same, and hold the same in the end."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratune.config.convert import flatten
from loratune.config.mixture import SOURCES, by_name
from loratune.config.schema import RunConfig
from loratune.errors import ConfigError, LoratuneError, StorageError, TrainingError, raise_together
from loratune.runs import processes
from loratune.runs.drift import Change
from loratune.runs.notices import named_ranks
from loratune.runs.provenance import package_versions
from loratune.runs.records import recipe_record

CLOCK_TOLERANCE = 10.0
"""Seconds; torchrun takes a machine for dead whose heartbeat looks 15 seconds old."""
SEEN_WITHIN = 10.0
"""Seconds that a network file system may take to show one machine what another wrote."""
_COMPARED = (
    "base", "tokenizer", "data", "encoded", "test", "encoded_test", "clock", "projection",
    "adapter",
)  # fmt: skip
# Machines may keep the same files in different places; their content has fingerprints.
_PLACES = ("model.path", "data.path", "data.eval_path", "data.test_path", "adapter_path")


class DisagreementError(LoratuneError):
    """The processes of a run do not fit together: every one of them says so in the same words."""


class _DifferentError(DisagreementError, ConfigError):
    pass


class _NotSharedError(DisagreementError, StorageError):
    pass


def check_start(config: RunConfig) -> None:
    """Stop every process if one was started with another recipe, clock or version.

    Raises:
        ConfigError: one line for each key and process that differs from the first process.
    """
    recipe = {**recipe_record(config), "resume": config.resume, "allow_drift": config.allow_drift}
    mine = _settings(recipe) | flatten({"versions": package_versions()})
    processes.barrier()  # the clocks are read at one moment
    others = processes.gather((time.time(), mine))
    clocks = [clock - others[0][0] for clock, _ in others]
    raise_together([*_clock_errors(clocks), *_errors([facts for _, facts in others])])


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Stop every process if one of them has another recipe, base or data, or other rows.

    Args:
        facts: what this process is about to train on, its ``recipe`` included.

    Raises:
        ConfigError: one line for each key and process that differs from the first process.
    """
    mine = {key: facts.get(key) for key in _COMPARED} | _settings(facts["recipe"])
    mine |= {key: value for key, value in facts.items() if key.startswith(SOURCES)}
    raise_together(_errors(processes.gather(mine)))


def check_shared(folder: Path, lock: Path, patience: float) -> None:
    """Stop every process if one does not see what the first one has just written into the folder.

    Args:
        folder: the run's folder.
        lock: a file of it whose content is the first process's own.
        patience: seconds to look for it, at most ``SEEN_WITHIN``.

    Raises:
        StorageError: naming the ranks and their machines.
    """
    written = processes.broadcast(lock.read_text("utf-8") if processes.is_main() else None)
    sees = _sees(lock, written, min(patience, SEEN_WITHIN))
    seen = processes.gather((sees, socket.gethostname()))
    blind = [rank for rank, (has_seen, _) in enumerate(seen) if not has_seen]
    if blind:
        hosts = ", ".join(dict.fromkeys(seen[rank][1] for rank in blind))
        raise _NotSharedError(
            f"{named_ranks(blind)} on {hosts} cannot see what rank 0 on {seen[0][1]} wrote",
            where=str(folder),
            fix="out must name a folder that all machines share",
        )


def check_enough_rows(rows: int, batch_size: int) -> None:
    """Stop every process if there are not as many rows as processes, and name those without work.

    Raises:
        ConfigError: if some process could never have a row.
    """
    world = processes.world_size()
    if rows < world:
        raise _DifferentError(
            f"{world} processes share {rows} training rows: {_from(rows)} would have none",
            where="launch.nproc",
            fix=f"start at most {rows} processes",
        )
    if batch_size < world:
        processes.say_once(
            f"warning: the {batch_size} rows of a micro-batch are shared by {world} processes: "
            f"{_from(batch_size)} never has any; set trainer.batch_size={world} or more"
        )


def _from(first: int) -> str:
    return named_ranks(range(first, processes.world_size()))


def _sees(path: Path, content: str, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            if path.read_text("utf-8") == content:
                return True
        except OSError:
            pass
        time.sleep(0.2)
    return False


def _settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten(by_name(recipe))
    return {key: value for key, value in flat.items() if key not in _PLACES}


def _clock_errors(clocks: Iterable[float]) -> Iterator[ConfigError]:
    for rank, ahead in enumerate(clocks):
        if abs(ahead) > CLOCK_TOLERANCE:
            word = "ahead of" if ahead > 0 else "behind"
            yield _DifferentError(
                f"the clock of rank {rank} is {abs(ahead):.0f} s {word} rank 0's",
                where="system time",
                fix="set the machines' clocks (NTP)",
            )


def _errors(all_facts: list[dict[str, Any]]) -> Iterator[ConfigError]:
    first, *others = all_facts
    for rank, other in enumerate(others, start=1):
        for change in _differences(first, other):
            yield _DifferentError(
                f"rank {rank} differs from rank 0: {change}",
                where=change.key,
                fix="start every process with the same recipe, files and versions",
            )


def check_published(file: Mapping[str, str | Sequence[str]], own: Mapping[str, str]) -> None:
    """Stop every process if the file that one of them is about to publish is not what all hold.

    A file into which most of the tensors came empty looks whole: names, shapes and finite numbers
    are right.

    Args:
        file: of the main process: tensor name to sha256 in the file, or to those of every
            process's rows of a tensor that they share out.
        own: of this process: tensor name to sha256 of what it holds.

    Raises:
        TrainingError: one line for each process that holds other tensors.
    """
    file = processes.broadcast(file)
    rank = processes.rank()
    wrong = [
        name
        for name, value in file.items()
        if own.get(name) != (value if isinstance(value, str) else value[rank])
    ]
    raise_together(
        TrainingError(
            f"{len(names)} of {len(file)} tensors in the adapter's file are not those that rank "
            f"{rank} holds: '{names[0]}'",
            where="publishing the adapter",
            fix="nothing was published; the checkpoints are whole: report this with the recipe",
        )
        for rank, names in enumerate(processes.gather(wrong))
        if names
    )


def _differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Change]:
    different = {k for k in first.keys() | other.keys() if first.get(k) != other.get(k)}
    if different & {"data", "tokenizer"}:
        different.discard("encoded")  # follows from them
    if different & {"data", "test", "tokenizer"}:
        different.discard("encoded_test")
    for key in sorted(different):
        yield Change(key, first.get(key), other.get(key))
