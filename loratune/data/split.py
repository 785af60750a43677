"""Orders and held-out rows drawn from seeds: the same on every machine and in every process."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Sequence

from loratune.data.rows import Example
from loratune.errors import DataError


def split_examples(
    examples: Sequence[Example], fraction: float, *, seed: int, by: str = "row"
) -> tuple[list[Example], list[Example]]:
    """Training and evaluation examples, each in their original order.

    Args:
        examples: all of them.
        fraction: share held out, in (0, 1); at least one row.
        seed: another seed holds out other rows.
        by: ``row``, or ``prompt`` to keep rows that share a prompt on one side; whole groups are
            then held out until the share is reached.

    Raises:
        DataError: if one side would be empty.
    """
    groups: dict[object, list[int]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(example.question if by == "prompt" else number, []).append(number)
    wanted = max(1, round(fraction * len(examples)))
    held_out: set[int] = set()
    members = list(groups.values())
    for place in shuffled(len(groups), seed):
        if len(held_out) >= wanted:
            break
        held_out.update(members[place])
    train = [example for n, example in enumerate(examples) if n not in held_out]
    if not train:
        what = "prompts" if by == "prompt" else "rows"
        cause = f"{len(groups)} {what} cannot be split: no training row would be left"
        raise DataError(cause, where="data.eval_fraction", fix="set data.eval_path instead")
    return train, [example for n, example in enumerate(examples) if n in held_out]


def shuffled(count: int, *seeds: int) -> array[int]:
    """A permutation of ``range(count)``, a pure function of ``count`` and the seeds."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    order = array("q", range(count))
    random.Random(int.from_bytes(digest[:8], "big")).shuffle(order)
    return order
