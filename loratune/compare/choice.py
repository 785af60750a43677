"""Which variant a comparison speaks for: the best, or a cheaper one shown to be as good."""

from __future__ import annotations

from dataclasses import dataclass

from loratune.compare.result import Comparison, Difference, VariantResult

KEPT_SHARE = 0.99
"""As good as the best: at least this share of what the best one gained over the base."""


@dataclass(frozen=True)
class Choice:
    """A comparison's loss on the final rows, judged.

    Attributes:
        best: the lowest mean loss.
        chosen: the cheapest of the best and those that are as good.
        margin: nats per token that "as good" allows.
        as_good: variants that the 95 % interval shows to be within ``margin`` of the best.
        undecided: no significant difference, yet the interval reaches beyond ``margin``.
        worse: significantly worse than the best, and not shown to be within ``margin``.
    """

    best: VariantResult
    chosen: VariantResult
    margin: float
    as_good: tuple[VariantResult, ...]
    undecided: tuple[VariantResult, ...]
    worse: tuple[VariantResult, ...]


def choose(comparison: Comparison) -> Choice | None:
    """Judge by loss; among equals by what the adapter stores and optimizes.

    That no difference was found is no proof of equality: with few seeds every interval is wide.
    So a cheaper variant is chosen only if its interval shows that it keeps ``KEPT_SHARE`` of the
    gain.  ``None`` if nothing was measured.
    """
    order = ranked(comparison)
    if not order:
        return None
    best = order[0]
    margin = (1 - KEPT_SHARE) * _gain(comparison, best)
    kinds: dict[str, list[VariantResult]] = {"as good": [], "undecided": [], "worse": []}
    for variant in order[1:]:
        test = difference(comparison, best.label, variant.label, "loss")
        if test is not None and most_lost(test, variant.label) <= margin:
            kinds["as good"].append(variant)
        elif test is not None and test.significant:
            kinds["worse"].append(variant)
        else:
            kinds["undecided"].append(variant)
    chosen = min([best, *kinds["as good"]], key=cost)
    return Choice(
        best, chosen, margin,
        *(tuple(sorted(found, key=cost)) for found in kinds.values()),
    )  # fmt: skip


def _gain(comparison: Comparison, best: VariantResult) -> float:
    loss = best.estimates["loss"].mean
    return loss if comparison.base.loss is None else comparison.base.loss - loss


def cost(variant: VariantResult) -> tuple[int, float]:
    """Bytes in the file and in the optimizer; the loss decides between equals."""
    costs = variant.costs
    return costs.stored_bytes + costs.optimizer_bytes, variant.estimates["loss"].mean


def ranked(comparison: Comparison) -> list[VariantResult]:
    """The variants that have a loss, the lowest first."""
    measured = [variant for variant in comparison.variants if "loss" in variant.estimates]
    return sorted(measured, key=lambda variant: variant.estimates["loss"].mean)


def difference(comparison: Comparison, one: str, other: str, metric: str) -> Difference | None:
    """The test of two variants in one metric, whichever came first."""
    pair = {one, other}
    found = (d for d in comparison.differences if d.metric == metric)
    return next((d for d in found if {d.first, d.second} == pair), None)


def most_lost(test: Difference, label: str) -> float:
    """The most that ``label`` may lose against the other of the pair, by the 95 % interval."""
    return max(0.0, test.high if test.first == label else -test.low)
