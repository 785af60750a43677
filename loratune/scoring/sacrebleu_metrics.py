"""BLEU and chrF as sacrebleu computes them, over the whole corpus and with all references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loratune.scoring.metric import TextMetric


class SacrebleuMetric(TextMetric):
    """A corpus metric of sacrebleu's, 0 to 100, with sacrebleu's default settings.

    A prompt's parts are the segment statistics that sacrebleu itself adds up, and resamples for
    its own intervals; any number of references is matched at once.
    """

    def __init__(self, name: str, label: str, metric: Any) -> None:
        self.name, self.label, self._metric = name, label, metric

    def parts(self, answer: str, references: Sequence[str]) -> list[float]:
        streams = [[reference] for reference in references]
        [statistics] = self._metric._extract_corpus_statistics([answer], streams)
        return [float(number) for number in statistics]

    def score(self, sums: Sequence[float], prompts: int) -> float:
        counts = [round(number) for number in sums]
        return float(self._metric._compute_score_from_stats(counts).score)


def bleu() -> TextMetric:
    """BLEU-4 (Papineni et al. 2002), tokenized as 13a, smoothed by ``exp``."""
    from sacrebleu.metrics.bleu import BLEU

    return SacrebleuMetric("bleu", "BLEU", BLEU())


def chrf() -> TextMetric:
    """ChrF2 (Popović 2015): F-score of character 6-grams, recall counted double."""
    from sacrebleu.metrics.chrf import CHRF

    return SacrebleuMetric("chrf", "chrF", CHRF())
