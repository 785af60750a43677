"""How sure a score is: prompts resampled (Efron's bootstrap), and differences paired by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune.scoring.metric import TextMetric

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEVEL = 0.95
_CHUNK_NUMBERS = 1 << 22

Parts = Sequence[Sequence[float]]
"""For each prompt the numbers that a metric adds up."""


@dataclass(frozen=True)
class Score:
    """A metric's value, with its 95 % interval where there are prompts to resample."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Gain:
    """Adapted minus base, paired by prompt: with its 95 % interval and two-sided p-value."""

    difference: float
    low: float | None
    high: float | None
    p: float | None


class TokenMean(TextMetric):
    """The mean over tokens of something summed over each unit's tokens, such as the loss.

    A unit's parts are the sum and the tokens.
    """

    def __init__(self, name: str, label: str = "") -> None:
        self.name, self.label = name, label or name

    def parts(self, answer: str, references: Sequence[str]) -> list[float]:
        raise NotImplementedError("its parts come from the model, not from texts")

    def score(self, sums: Sequence[float], prompts: int) -> float:
        return sums[0] / sums[1]

    def scores(self, sums: Tensor, prompts: int) -> Tensor:
        return sums[:, 0] / sums[:, 1]

    @property
    def resamples(self) -> int:
        return 10_000


def score_of(metric: TextMetric, parts: Parts) -> float:
    """The metric over all prompts."""
    return metric.score([sum(column) for column in zip(*parts, strict=True)], len(parts))


def estimated(metric: TextMetric, parts: Parts) -> Score:
    """The metric over all prompts, with its interval."""
    value = score_of(metric, parts)
    if len(parts) < 2:
        return Score(value, None, None)
    return Score(value, *_interval(resampled(metric, parts)))


def gained(metric: TextMetric, adapted: Parts, base: Parts) -> Gain:
    """How much better one model's prompts score than the other's, on the same resamples of both."""
    difference = score_of(metric, adapted) - score_of(metric, base)
    if len(adapted) < 2:
        return Gain(difference, None, None, None)
    draws = resampled(metric, adapted) - resampled(metric, base)
    return Gain(difference, *_interval(draws), two_sided(draws))


def resampled(
    metric: TextMetric, parts: Parts, resamples: int | None = None, seed: int = 0
) -> Tensor:
    """Scores of as many prompts drawn with replacement, ``resamples`` times; (resamples,).

    The same seed draws the same prompts, so that two models' scores are paired.
    """
    import torch

    table = torch.tensor(parts, dtype=torch.float64)
    prompts, width = table.shape
    generator = torch.Generator().manual_seed(seed)
    resamples = resamples or metric.resamples
    sums = [table[chosen].sum(1) for chosen in _chosen(prompts, width, resamples, generator)]
    return metric.scores(torch.cat(sums), len(parts))


def _chosen(
    prompts: int, width: int, resamples: int, generator: torch.Generator
) -> Sequence[Tensor]:
    """Row numbers (resamples, prompts) in pieces that fit in memory."""
    import torch

    rows = max(1, _CHUNK_NUMBERS // (prompts * width))
    counts = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return [torch.randint(prompts, (count, prompts), generator=generator) for count in counts]


def _interval(draws: Tensor) -> tuple[float, float]:
    import torch

    tail = (1 - LEVEL) / 2
    ends = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def two_sided(draws: Tensor) -> float:
    """Twice the smaller share of draws beyond zero; never 0, since draws are finite in number."""
    below, above = int((draws <= 0).sum()), int((draws >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(draws) + 1))
