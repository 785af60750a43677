"""Means, paired differences and their uncertainty, over prompts and over seeds.

A training is a random draw (its seed), and so is a prompt.  The prompts, of which there are many,
are resampled (Efron's bootstrap).  The seeds, of which there are three to ten, are too few to
resample: a bootstrap of three values covers 75 %, not 95 %.  Their spread enters as Student's t
with one degree of freedom less than there are seeds, which is exact for normal seed effects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune.compare.text_scores import TextScores
from loratune.scoring.resampling import two_sided

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RESAMPLES = 10_000
LEVEL = 0.95
SIGNIFICANT = 0.05
_CHUNK_NUMBERS = 1 << 22


@dataclass(frozen=True)
class Scores:
    """One metric of one setting.

    Attributes:
        sums: for each seed, for each unit (a prompt, a text) the metric summed over its tokens.
        weights: tokens of each unit (1 each where a unit counts once).
    """

    sums: Sequence[Sequence[float]]
    weights: Sequence[float]

    @property
    def seeds(self) -> int:
        """Trainings behind it."""
        return len(self.sums)

    @property
    def units(self) -> int:
        """Prompts or texts behind it."""
        return len(self.weights)

    def seed_means(self) -> Tensor:
        """The weighted mean over all units, for each seed; (seeds,)."""
        import torch

        return torch.tensor(self.sums, dtype=torch.float64).sum(1) / sum(self.weights)

    def resampled(self, resamples: int, generator: torch.Generator) -> Tensor:
        """Means over the seeds, of units drawn again; (resamples,)."""
        import torch

        sums = torch.tensor(self.sums, dtype=torch.float64).mean(0)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return _resampled_means(sums, weights, resamples, generator)

    def minus(self, other: Scores) -> Scores:
        """The paired difference, seed by seed and unit by unit.

        Raises:
            ValueError: if seeds or units do not match.
        """
        if list(self.weights) != list(other.weights) or len(self.sums) != len(other.sums):
            raise ValueError("only scores of the same seeds and units can be paired")
        sums = [
            [a - b for a, b in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(self.sums, other.sums, strict=True)
        ]
        return Scores(sums, self.weights)


@dataclass(frozen=True)
class Interval:
    """A mean, its 95 % interval, and the two-sided p-value of being zero.

    ``low`` and ``high`` are ``None`` where nothing varies that could be resampled.
    ``p_equivalence`` is that of two one-sided tests (TOST, Schuirmann 1987): how likely a mean as
    near to zero would be, if the truth lay at the margin or beyond.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    p_equivalence: float | None = None


def interval(
    scores: Scores | TextScores,
    *,
    margin: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean over units and seeds, with its uncertainty.

    Args:
        scores: of every seed and unit.
        margin: what still counts as zero; ``None`` tests no equivalence.
        resamples: draws that the uncertainty is read from.
        seed: of the draws.

    Each resample draws as many units as there are, with replacement, and adds s/sqrt(S) times a
    draw of Student's t with S - 1 degrees of freedom, s being the standard deviation of the S
    seeds' means.  With one seed the spread between seeds is unknown and left out.
    """
    import torch

    means, seeds = scores.seed_means(), scores.seeds
    mean = float(means.mean())
    if scores.units < 2 and seeds < 2:
        return Interval(mean, None, None, None)
    generator = torch.Generator().manual_seed(seed)
    draws = scores.resampled(resamples, generator)
    if seeds > 1:
        deviation = float(means.std())
        draws = draws + deviation / math.sqrt(seeds) * _student(seeds - 1, len(draws), generator)
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    equivalence = None if margin is None else _beyond(draws, margin)
    return Interval(mean, low, high, two_sided(draws), equivalence)


def _resampled_means(
    sums: Tensor, weights: Tensor, resamples: int, generator: torch.Generator
) -> Tensor:
    """Ratio of sums to weights for resampled units; (resamples,)."""
    import torch

    units = len(weights)
    if units == 1:
        return (sums / weights).expand(resamples)
    rows = max(1, _CHUNK_NUMBERS // units)
    means = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        chosen = torch.randint(units, (count, units), generator=generator)
        means.append(sums[chosen].sum(1) / weights[chosen].sum(1))
    return torch.cat(means)


def _student(degrees: int, count: int, generator: torch.Generator) -> Tensor:
    """Draws of Student's t: a normal over the root of a mean of ``degrees`` squared normals."""
    import torch

    normal = torch.randn(count, dtype=torch.float64, generator=generator)
    squares = torch.randn(count, degrees, dtype=torch.float64, generator=generator).square()
    return normal / squares.mean(1).sqrt()


def _beyond(draws: Tensor, margin: float) -> float:
    """The larger share of draws at or beyond either margin; never 0, since they are finite."""
    above, below = int((draws >= margin).sum()), int((draws <= -margin).sum())
    return (max(above, below) + 1) / (len(draws) + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values, in the given order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def over_seeds(values: Sequence[float], *, resamples: int = RESAMPLES) -> Interval:
    """A mean over seeds alone: one number for each seed, as for times."""
    return interval(Scores([[value] for value in values], [1.0]), resamples=resamples)


def share_interval(hits: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927), sound for 0 and all of few trials."""
    z = 1.959964
    share = hits / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = share * (1 - share) / trials + z * z / (4 * trials * trials)
    half = z * math.sqrt(spread) / (1 + z * z / trials)
    return max(0.0, middle - half), min(1.0, middle + half)
