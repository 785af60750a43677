"""What a model scores on each prompt, so that differences can be paired prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratune.data.arrangement import Arrangement
from loratune.data.encoded_rows import EncodedRow
from loratune.loss.causal_model import LanguageModelHead
from loratune.stages.evaluate import summed_scores


@dataclass(frozen=True)
class UnitScores:
    """Sums over each unit's supervised tokens.

    Attributes:
        loss: in nats.
        correct: tokens ranked first.
        tokens: how many there are.
    """

    loss: list[float]
    correct: list[float]
    tokens: list[float]

    @property
    def mean_loss(self) -> float:
        """Nats per token over all units."""
        return sum(self.loss) / sum(self.tokens)

    @property
    def token_accuracy(self) -> float:
        """Share of tokens ranked first."""
        return sum(self.correct) / sum(self.tokens)


def score_units(
    head: LanguageModelHead,
    rows: Sequence[EncodedRow],
    groups: Sequence[Sequence[int]],
    arrangement: Arrangement,
    batch_size: int,
) -> UnitScores:
    """Losses of every unit; a unit's rows share batches with no other's.

    Args:
        head: the model in eval mode.
        rows: encoded rows.
        groups: row numbers of each unit.
        arrangement: how the rows of a batch lie in its sequences.
        batch_size: most rows at a time.
    """
    scores = UnitScores([], [], [])
    for group in groups:
        batches = [group[n : n + batch_size] for n in range(0, len(group), batch_size)]
        own = summed_scores(head, rows, batches, arrangement)
        scores.loss.append(own.loss)
        scores.correct.append(own.correct)
        scores.tokens.append(own.tokens)
    return scores
