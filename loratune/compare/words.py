"""What a comparison found, in sentences; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loratune.compare.choice import KEPT_SHARE, choose
from loratune.compare.result import Comparison, Difference, Estimate, VariantResult


@dataclass(frozen=True)
class Metric:
    """A number that pairs are compared in.

    Attributes:
        key: in ``estimates`` and ``differences``.
        source: the scores it comes from.
        name: in sentences and tables.
        lower_is_better: which way is good.
        shown: how a value is written.
        signed: how a difference is written.
    """

    key: str
    source: str
    name: str
    lower_is_better: bool
    shown: Callable[[float], str]
    signed: Callable[[float], str]

    def span(self, low: float, high: float) -> str:
        """An interval of differences; its unit once."""
        unit = " points" if self.signed is _points else ""
        return f"{self.signed(low).removesuffix(unit)} to {self.signed(high)}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points"


METRICS = (
    Metric("loss", "loss", "loss", True, "{:.4f}".format, "{:+.4f}".format),
    Metric("exact_match", "exact", "exact match", False, "{:.1%}".format, _points),
    Metric("token_accuracy", "correct", "token accuracy", False, "{:.1%}".format, _points),
    Metric("forgetting", "heldout", "forgetting", True, "{:+.4f}".format, "{:+.4f}".format),
)
BY_KEY = {metric.key: metric for metric in METRICS}


def possible_interval(metric: str, estimate: Estimate) -> tuple[float, float]:
    """The interval without what cannot be: a share below 0 or above 1, a negative loss."""
    assert estimate.low is not None and estimate.high is not None
    if metric == "forgetting":
        return estimate.low, estimate.high
    top = estimate.high if metric == "loss" else min(1.0, estimate.high)
    return max(0.0, estimate.low), top


def difference_in_words(one: Difference) -> str:
    """``lora has a lower loss than vera: -0.0123 (95 % CI -0.02 to -0.01, p 0.001 after Holm)``."""
    metric = BY_KEY[one.metric]
    numbers = (
        f"{metric.signed(one.difference)} "
        f"(95 % CI {metric.span(one.low, one.high)}, "
        f"p {p_value(one.p_holm)} after Holm)"
    )
    if not one.significant:
        return (
            f"{one.first} and {one.second}: no significant difference in {metric.name}: {numbers}"
        )
    way = "lower" if one.difference < 0 else "higher"
    return f"{one.first} has a {way} {metric.name} than {one.second}: {numbers}"


def p_value(p: float) -> str:
    """A p-value with one significant digit more than it deserves."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def findings(comparison: Comparison) -> list[str]:
    """What to choose and how sure that is, then what limits it."""
    good = [variant for variant in comparison.variants if "loss" in variant.estimates]
    lines = _choice(comparison)
    lines += [line for key in ("loss", "exact_match") for line in _best(comparison, good, key)]
    lines += _cheapest(comparison, good)
    lines += _failures(comparison)
    return lines + _limits(comparison)


def _choice(comparison: Comparison) -> list[str]:
    found = choose(comparison)
    if found is None or len(comparison.variants) < 2:
        return []
    if found.chosen is found.best:
        shown = "; nothing cheaper is shown to be as good" if found.undecided else ""
        return [f"Choose {found.best.label}: it has the lowest loss{shown}."]
    return [
        f"Choose {found.chosen.label}: the cheapest that keeps {KEPT_SHARE:.0%} of what "
        f"{found.best.label} gained."
    ]


def _best(comparison: Comparison, good: Sequence[VariantResult], key: str) -> list[str]:
    metric = BY_KEY[key]
    ranked = sorted(
        (variant for variant in good if key in variant.estimates),
        key=lambda v: v.estimates[key].mean,
        reverse=not metric.lower_is_better,
    )
    if len(ranked) < 2:
        return []
    best = ranked[0]
    value = metric.shown(best.estimates[key].mean)
    equal = equals(comparison, best.label, key)
    word = "lowest" if metric.lower_is_better else "highest"
    if not equal:
        return [f"{best.label} has the {word} {metric.name}, {value}, significantly so."]
    if len(equal) == len(ranked) - 1:
        return [f"No significant difference in {metric.name} between any and the best ({value})."]
    return [
        f"{best.label} has the {word} {metric.name}, {value}; no significant difference from "
        f"{', '.join(equal)}."
    ]


def equals(comparison: Comparison, label: str, key: str) -> list[str]:
    """The labels that no significant difference in ``key`` parts from ``label``."""
    return [
        one.second if one.first == label else one.first
        for one in comparison.differences
        if one.metric == key and label in (one.first, one.second) and not one.significant
    ]


def _cheapest(comparison: Comparison, good: Sequence[VariantResult]) -> list[str]:
    """Among those as good as the best in loss, who costs least."""
    if len(good) < 2:
        return []
    best = min(good, key=lambda variant: variant.estimates["loss"].mean)
    as_good = {best.label, *equals(comparison, best.label, "loss")}
    if len(as_good) < 2:
        return []
    fields = [variant for variant in good if variant.label in as_good]
    trainable = min(fields, key=lambda variant: variant.costs.trainable)
    peak = min(fields, key=_peak)
    lines = [
        f"Of these, {trainable.label} trains the fewest numbers ({trainable.costs.trainable:,})"
    ]
    if _peak(peak) < float("inf"):
        lines.append(f"{peak.label} has the lowest memory peak")
    return ["; ".join(lines) + "."]


def _peak(variant: VariantResult) -> float:
    estimate = variant.estimates.get("peak_bytes")
    return estimate.mean if estimate else float("inf")


def _failures(comparison: Comparison) -> list[str]:
    lines = []
    for variant in comparison.variants:
        if variant.reason:
            lines.append(f"{variant.label} failed: {variant.reason}.")
            continue
        lines += [
            f"{variant.label} seed {member.seed} failed: {member.reason}; "
            "its numbers come from the other seeds."
            for member in variant.members
            if member.reason
        ]
    return lines


def _limits(comparison: Comparison) -> list[str]:
    lines = [f"{v.label}: {note}." for v in comparison.variants for note in v.notes]
    seeds = len(comparison.seeds)
    if seeds < 2:
        lines.append("One seed: how much another seed would change is unknown; use seeds=3.")
    elif seeds < 3:
        lines.append("Two seeds say little about their spread; use seeds=3 or more.")
    scores = [
        v.estimates["exact_match"].mean for v in comparison.variants if "exact_match" in v.estimates
    ]
    if len(scores) > 1 and (min(scores) > 0.98 or max(scores) < 0.02):
        lines.append("Exact match is saturated here: only the loss can tell the variants apart.")
    prompts = comparison.rows.prompts
    if 0 < prompts < 100:
        lines.append(f"{prompts} prompts: differences of a few points cannot be seen.")
    return lines
