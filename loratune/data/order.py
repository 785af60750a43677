"""Orders drawn from seeds, the same on every machine and in every process."""

from __future__ import annotations

import hashlib
import random


def shuffled(count: int, *seeds: int) -> list[int]:
    """A permutation of ``range(count)``, a pure function of ``count`` and the seeds."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    order = list(range(count))
    random.Random(int.from_bytes(digest[:8], "big")).shuffle(order)
    return order
