"""Whether ``trainer.compile`` pays: what the compiler takes, and what its code saves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from loratune.training.torch_errors import compile_errors
from loratune.units import duration

NOTICEABLE = 0.02
"""Of a block's time: what is saved beyond it is not the trial's own noise."""


@dataclass(frozen=True)
class Compiled:
    """A block that torch.compile made, beside the same block without it.

    Attributes:
        block: seconds of its forward and backward, per token.
        compiling: seconds until it was ready for every length, per block.
    """

    block: float
    compiling: float


def compile_trial(
    backbone: nn.Module,
    step: Callable[[Tensor], None],
    ids: Tensor,
    timed: Callable[[Callable[[], None]], float],
    eager: float,
) -> tuple[float, float]:
    """Compile a backbone; gives the seconds of a step and those of compiling.

    Two lengths are run: torch compiles for the first one alone, and at the second one once more,
    for every length.

    Args:
        backbone: some blocks; compiled in place.
        step: forward and backward on token ids.
        ids: (B, T) with T > 2.
        timed: measures a step that is warm.
        eager: seconds of the same step before.

    Raises:
        TrainingError: if the compiler does not work.
    """
    with compile_errors():
        backbone.compile()
        started = time.perf_counter()
        for tokens in (ids, ids[:, : ids.shape[1] // 2]):
            step(tokens)
        compiling = time.perf_counter() - started - 2 * eager
        return timed(lambda: step(ids)), max(0.0, compiling)


def compile_advice(eager: float, compiled: float, compiling: float, steps: int) -> str | None:
    """What speaks against compiling, or nothing.

    Args:
        eager: seconds of all steps without it.
        compiled: seconds of all steps with it.
        compiling: seconds of the compiler.
        steps: of the recipe.
    """
    saved = eager - compiled
    if saved <= NOTICEABLE * eager:
        cause = "and makes this model no faster here"
    elif saved < compiling:
        cause = f"and pays from {round(compiling / saved * steps):,} steps on, not in {steps:,}"
    else:
        return None
    return f"trainer.compile takes about {duration(compiling, 2)} first {cause}: leave it out"
