"""The numbers that settings are compared in, and how they are written; no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from loratune.compare.result import Difference, Estimate
from loratune.scoring.registry import metric_label


@dataclass(frozen=True)
class Metric:
    """A number that pairs are compared in.

    Attributes:
        key: in ``estimates`` and ``differences``.
        source: the scores it comes from.
        name: in sentences and tables.
        text: how a value is written.
        signed: how a difference is written.
        lower_is_better: the other way for shares of what is right.
    """

    key: str
    source: str
    name: str
    text: Callable[[float], str]
    signed: Callable[[float], str]
    lower_is_better: bool = False

    def span(self, low: float, high: float) -> str:
        """An interval of differences; its unit once."""
        unit = " points" if self.signed is _points else ""
        return f"{self.signed(low).removesuffix(unit)} to {self.signed(high)}"

    def with_interval(self, estimate: Estimate) -> str:
        """The mean, and its interval in brackets on a second line."""
        text = self.text(estimate.mean)
        if estimate.low is None or estimate.high is None:
            return text
        low, high = possible_interval(self.key, estimate.low, estimate.high)
        return f"{text}\n[{self.text(low)}, {self.text(high)}]"


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points"


LOSS = "loss"
FORGETTING = "forgetting"
METRICS = (
    Metric(LOSS, "loss", "loss", "{:.4f}".format, "{:+.4f}".format, lower_is_better=True),
    Metric("exact_match", "exact", "exact match", "{:.1%}".format, _points),
    Metric("token_accuracy", "correct", "token accuracy", "{:.1%}".format, _points),
    Metric(
        FORGETTING,
        "heldout",
        "forgetting",
        "{:+.4f}".format,
        "{:+.4f}".format,
        lower_is_better=True,
    ),
)
BY_KEY = {metric.key: metric for metric in METRICS}
_SHARES = ("exact_match", "token_accuracy")


def metric_of(key: str) -> Metric:
    """A metric by its key: one of the above, or one of ``evaluate.metrics``."""
    if key in BY_KEY:
        return BY_KEY[key]
    return Metric(key, key, metric_label(key), "{:.4g}".format, "{:+.3g}".format)


def metrics_with(text_metrics: Iterable[str]) -> list[Metric]:
    """All metrics of a comparison that measured these on its answers."""
    return [*METRICS, *(metric_of(name) for name in text_metrics if name not in BY_KEY)]


def possible_interval(metric: str, low: float, high: float) -> tuple[float, float]:
    """The interval without what cannot be: a share below 0 or above 1, a negative loss."""
    if metric == FORGETTING:
        return low, high
    return max(0.0, low), min(1.0, high) if metric in _SHARES else high


def difference_in_words(one: Difference) -> str:
    """``lora has a lower loss than vera: -0.0123 (95 % CI -0.02 to -0.01, p 0.001 after Holm)``."""
    metric = metric_of(one.metric)
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


def verdict_word(one: Difference) -> str:
    """``equivalent within 0.038``, ``lora better`` or ``undecided``."""
    metric = metric_of(one.metric)
    if one.equivalent and one.margin is not None:
        return f"equivalent within {metric.signed(one.margin).removeprefix('+')}"
    if not one.significant:
        return "undecided"
    return f"{one.first if (one.difference < 0) == metric.lower_is_better else one.second} better"


def p_value(p: float) -> str:
    """A p-value to three decimals."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
