"""Dropout that remembers one number: its seed.

The mask of a layer's input is drawn block by block of rows in the forward pass, and drawn again
from the same seed in the backward pass, so that it is neither saved nor ever held whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 18
"""Mask elements alive at one time (rounded to whole rows): a block stays in the cache."""


@dataclass(frozen=True, slots=True)
class Dropout:
    """Which elements of a (rows, width) input are dropped, each with probability ``p``."""

    p: float
    seed: int

    @classmethod
    def draw(cls, p: float) -> Dropout | None:
        """A new mask; ``None`` where nothing is dropped.

        The seed is one draw from torch's default CPU generator, so that whoever restores torch's
        random state (a checkpoint, gradient checkpointing) restores the mask.
        """
        if p == 0.0:
            return None
        return cls(p, int(torch.empty((), dtype=torch.int64).random_()))

    @property
    def scale(self) -> float:
        """Factor 1/(1 - p) that keeps the expectation; the masks hold only 0 and 1."""
        return 1.0 / (1.0 - self.p)

    def masks(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows of ``like`` (rows, width) with their 0/1 masks in ``like``'s dtype."""
        rows, width = like.shape
        generator = torch.Generator(device=like.device).manual_seed(self.seed)
        block = max(1, BLOCK_ELEMENTS // max(1, width))
        for start in range(0, rows, block):
            stop = min(start + block, rows)
            keep = torch.empty(stop - start, width, dtype=like.dtype, device=like.device)
            yield slice(start, stop), keep.bernoulli_(1.0 - self.p, generator=generator)
