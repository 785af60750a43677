"""Dropout that remembers one number: its seed.

The mask of a layer's input is drawn block by block of rows in the forward pass, and drawn again
from the same seed in the backward pass, so that it is neither saved nor ever held whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 1 << 16
"""A mask element is one 16-bit number compared with p, so p is rounded to 1/65,536."""
CPU_BLOCK = 1 << 16
"""Mask elements alive at one time on a CPU (rounded to whole rows): a block stays in the cache."""
DEVICE_BLOCK = 1 << 24
"""The same on an accelerator, where a block should be worth a launch."""


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
    def dropped_levels(self) -> int:
        """How many of the 65,536 equally likely numbers drop an element."""
        return min(round(self.p * LEVELS), LEVELS - 1)

    @property
    def scale(self) -> float:
        """Factor 1/(1 - p) that keeps the expectation; the masks hold only 0 and 1."""
        return LEVELS / (LEVELS - self.dropped_levels)

    def masks(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows of ``like`` (rows, width) with their 0/1 masks in ``like``'s dtype.

        A yielded mask belongs to the caller until the next one is asked for.
        """
        rows, width = like.shape
        generator = torch.Generator(device=like.device).manual_seed(self.seed)
        block = max(1, (CPU_BLOCK if like.device.type == "cpu" else DEVICE_BLOCK) // max(1, width))
        block = min(block, rows)
        quads = torch.empty(-(-block * width // 4), dtype=torch.int64, device=like.device)
        keep = like.new_empty(block, width)
        for start in range(0, rows, max(1, block)):
            stop = min(start + block, rows)
            # bernoulli_ costs ten times as much on a CPU as 64 random bits for four elements.
            quads.random_(-(2**63), None, generator=generator)
            bits = quads.view(torch.int16)[: (stop - start) * width]
            bits.ge_(self.dropped_levels - LEVELS // 2)
            yield slice(start, stop), keep[: stop - start].copy_(bits.view(-1, width))
