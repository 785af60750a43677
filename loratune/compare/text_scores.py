"""Metrics of answers over prompts and seeds: BLEU and the like are no means over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune.scoring.metric import TextMetric
from loratune.scoring.resampling import Parts, resampled, score_of

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True)
class TextScores:
    """One metric of one setting, or of one minus another.

    Attributes:
        metric: scores the parts of any set of prompts.
        sides: each its sign and, for each seed, the parts of every prompt.
    """

    metric: TextMetric
    sides: Sequence[tuple[float, Sequence[Parts]]]

    @property
    def seeds(self) -> int:
        """Trainings behind it."""
        return len(self.sides[0][1])

    @property
    def units(self) -> int:
        """Prompts behind it."""
        return len(self.sides[0][1][0])

    def minus(self, other: TextScores) -> TextScores:
        """The paired difference, seed by seed and prompt by prompt.

        Raises:
            ValueError: if seeds or prompts do not match.
        """
        if (self.seeds, self.units) != (other.seeds, other.units):
            raise ValueError("only scores of the same seeds and units can be paired")
        return TextScores(self.metric, [*self.sides, *((-s, parts) for s, parts in other.sides)])

    def seed_means(self) -> Tensor:
        """The metric over all prompts, for each seed; (seeds,)."""
        import torch

        return torch.tensor(
            [
                sum(sign * score_of(self.metric, parts[seed]) for sign, parts in self.sides)
                for seed in range(self.seeds)
            ],
            dtype=torch.float64,
        )

    def resampled(self, resamples: int, generator: Generator) -> Tensor:
        """Means over the seeds, of prompts drawn again; (draws,), fewer where each is costly."""
        draws = min(resamples, self.metric.resamples)
        seed = generator.initial_seed()
        scores = [
            sign * resampled(self.metric, one, draws, seed)
            for sign, parts in self.sides
            for one in parts
        ]
        total = scores[0].clone()
        for one in scores[1:]:
            total += one
        return total / self.seeds
