"""What a metric on generated answers promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

AnswerScore = Callable[[str, Sequence[str]], float]
"""The score of one answer, given the right answers to its prompt."""


class TextMetric(ABC):
    """A metric of answers against references; the higher, the better.

    Numbers of each prompt (``parts``) are summed over the prompts, and the sums are scored.  A mean
    needs one number a prompt; BLEU, which is not a mean, needs its counts of n-grams.  So the
    score of any resampled set of prompts follows from the parts, and no text is looked at twice.

    Attributes:
        name: as ``evaluate.metrics`` has it.
        label: in tables and sentences.
        is_share: whether values lie between 0 and 1 and are shown in percent.
    """

    name: str
    label: str
    is_share: bool = False

    @abstractmethod
    def parts(self, answer: str, references: Sequence[str]) -> list[float]:
        """The numbers of one prompt; as many for every prompt."""

    @abstractmethod
    def score(self, sums: Sequence[float], prompts: int) -> float:
        """The score of ``prompts`` prompts whose parts add up to ``sums``."""

    def scores(self, sums: Tensor, prompts: int) -> Tensor:
        """``score`` of every row of ``sums`` (sets, parts); (sets,)."""
        return sums.new_tensor([self.score(row, prompts) for row in sums.tolist()])

    @property
    def resamples(self) -> int:
        """How many sets of prompts an interval rests on: as in sacrebleu, 1,000."""
        return 1_000


class MeanMetric(TextMetric):
    """The mean of a score that each answer has by itself."""

    def __init__(
        self, name: str, answer_score: AnswerScore, label: str = "", *, is_share: bool = False
    ) -> None:
        self.name, self.label, self.is_share = name, label or name.replace("_", " "), is_share
        self._answer_score = answer_score

    def parts(self, answer: str, references: Sequence[str]) -> list[float]:
        return [float(self._answer_score(answer, references))]

    def score(self, sums: Sequence[float], prompts: int) -> float:
        return sums[0] / prompts

    def scores(self, sums: Tensor, prompts: int) -> Tensor:
        return sums[:, 0] / prompts

    @property
    def resamples(self) -> int:
        return 10_000
