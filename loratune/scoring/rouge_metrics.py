"""ROUGE-L as rouge-score computes it."""

from __future__ import annotations

from collections.abc import Sequence

from loratune.scoring.metric import MeanMetric, TextMetric


def rouge_l() -> TextMetric:
    """Mean F-measure of the longest common subsequence (Lin 2004), of each prompt's best reference.

    Words are lower-cased and not stemmed: rouge-score's own default.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])

    def best(answer: str, references: Sequence[str]) -> float:
        return float(scorer.score_multi(references, answer)["rougeL"].fmeasure)

    return MeanMetric("rouge_l", best, "ROUGE-L")
