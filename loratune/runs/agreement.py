"""Whether all processes of a run are about to do the same, and hold the same in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loratune.config.convert import flatten
from loratune.config.mixture import SOURCES, by_name
from loratune.errors import ConfigError, TrainingError, raise_together
from loratune.runs import processes
from loratune.runs.drift import Change

_COMPARED = (
    "base", "tokenizer", "data", "encoded", "test", "encoded_test", "clock", "projection",
    "adapter",
)  # fmt: skip
# Machines may keep the same files in different places; their content has fingerprints.
_PLACES = ("model.path", "data.path", "data.eval_path", "data.test_path", "adapter_path")


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Stop every process if one of them has another recipe, base or data, or other rows.

    Args:
        facts: what this process is about to train on, its ``recipe`` included.

    Raises:
        ConfigError: one line for each key and process that differs from the first process.
    """
    mine = {key: facts.get(key) for key in _COMPARED} | flatten(by_name(facts["recipe"]))
    mine = {key: value for key, value in mine.items() if key not in _PLACES}
    mine |= {key: value for key, value in facts.items() if key.startswith(SOURCES)}
    first, *others = processes.gather(mine)
    raise_together(
        ConfigError(
            f"rank {rank} differs from rank 0: {change}",
            where=change.key,
            fix="start every process with the same recipe and the same files",
        )
        for rank, other in enumerate(others, start=1)
        for change in _differences(first, other)
    )


def check_published(file: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Stop every process if the file that one of them is about to publish is not what all hold.

    A file into which most of the tensors came empty looks whole: names, shapes and finite numbers
    are right.

    Args:
        file: of the main process: tensor name to sha256 in the file.
        own: of this process: tensor name to sha256 of what it holds.

    Raises:
        TrainingError: one line for each process that holds other tensors.
    """
    file = processes.broadcast(file)
    wrong = [name for name, value in file.items() if own.get(name) != value]
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
