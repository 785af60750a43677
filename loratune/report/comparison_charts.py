"""The drawings of a comparison."""

from __future__ import annotations

from loratune.compare.result import Comparison, CurvePoint, VariantResult
from loratune.compare.words import possible_interval
from loratune.report.charts.chart_frame import Chart
from loratune.report.charts.interval import Interval, interval_chart
from loratune.report.charts.line import line_chart
from loratune.report.charts.scatter import scatter_chart
from loratune.report.charts.series import Point, Series
from loratune.report.comparison_verdict import verdict
from loratune.report.numbers import percent, significant

_LOSS = "loss, nats per token"
_MOST_PAIRS = 10


def looks(comparison: Comparison) -> dict[str, int]:
    """Label to colour, dash and marker, the same in every drawing."""
    return {variant.label: number for number, variant in enumerate(comparison.variants)}


def pareto_charts(comparison: Comparison) -> tuple[Chart, ...]:
    """Quality against trainable bytes and against memory."""
    note = "Lower left is better. Whiskers: 95 % interval. Dashed: what nothing beats on both."
    trained = [_quality(c, v, 4.0 * v.costs.trainable) for c, v in _numbered(comparison)]
    peaks = [
        _quality(look, variant, variant.estimates["peak_bytes"].mean)
        for look, variant in _numbered(comparison)
        if "peak_bytes" in variant.estimates
    ]
    charts = (
        scatter_chart("Quality against trainable bytes", "trainable bytes (fp32)", _LOSS,
                      [s for s in trained if s.points], note=note),
        scatter_chart("Quality against memory", "peak memory of a training step", _LOSS,
                      [s for s in peaks if s.points], note=note),
    )  # fmt: skip
    return tuple(chart for chart in charts if chart is not None)


def _numbered(comparison: Comparison) -> list[tuple[int, VariantResult]]:
    return list(enumerate(comparison.variants))


def _quality(look: int, variant: VariantResult, cost: float) -> Series:
    estimate = variant.estimates.get("loss")
    if estimate is None or cost <= 0:
        return Series(variant.label, (), look)
    point = Point(cost, estimate.mean, estimate.low, estimate.high)
    return Series(variant.label, (point,), look, line=False, markers=True)


def difference_charts(comparison: Comparison) -> tuple[Chart, ...]:
    """Every pair's difference with its interval; with many variants, those with the best one."""
    charts = (
        _differences(comparison, "loss", "Differences in loss", _LOSS,
                     "Left of zero: the first is better."),
        _differences(comparison, "exact_match", "Differences in exact match", "share of prompts",
                     "Right of zero: the first is better."),
    )  # fmt: skip
    return tuple(chart for chart in charts if chart is not None)


def _differences(
    comparison: Comparison, metric: str, title: str, unit: str, note: str
) -> Chart | None:
    pairs = [d for d in comparison.differences if d.metric == metric]
    best = verdict(comparison).best
    if len(pairs) > _MOST_PAIRS:
        pairs = [d for d in pairs if best in (d.first, d.second)]
    intervals = [
        Interval(f"{d.first} − {d.second}", d.difference, d.low, d.high, d.significant, d.words)
        for d in pairs
    ]
    whole = f"{note} Hollow: not told from zero after correction for the number of pairs."
    return interval_chart(title, f"difference in {unit}", intervals, note=whole)


def curve_charts(comparison: Comparison) -> tuple[Chart, ...]:
    """Dev loss of every variant against steps, tokens and seconds: mean and range over seeds."""
    note = "Line: mean over seeds; band: lowest to highest seed."
    axes = (
        ("Loss against steps", "optimizer steps", "step"),
        ("Loss against tokens", "answer tokens seen", "tokens"),
        ("Loss against time", "seconds in optimizer steps", "seconds"),
    )
    charts = [
        line_chart(
            title,
            across,
            f"dev {_LOSS}",
            [_curve(look, variant, key) for look, variant in _numbered(comparison)],
            note=note,
        )
        for title, across, key in axes
    ]
    return tuple(chart for chart in charts if chart is not None)


def _curve(look: int, variant: VariantResult, key: str) -> Series:
    by_step: dict[int, list[CurvePoint]] = {}
    for member in variant.members:
        for point in member.curve:
            if point.dev_loss is not None:
                by_step.setdefault(point.step, []).append(point)
    points = []
    for _, found in sorted(by_step.items()):
        losses = [point.dev_loss for point in found if point.dev_loss is not None]
        across = sum(float(getattr(point, key)) for point in found) / len(found)
        several = len(losses) > 1
        points.append(
            Point(
                across,
                sum(losses) / len(losses),
                min(losses) if several else None,
                max(losses) if several else None,
            )
        )
    return Series(variant.label, tuple(points), look, markers=len(points) <= 12)


def search_chart(comparison: Comparison) -> Chart | None:
    """How the loss depends on the learning rate, at the first and shortest round of the search."""
    series = [_searched(look, variant) for look, variant in _numbered(comparison)]
    return line_chart(
        "Learning-rate sensitivity",
        "learning rate",
        f"dev {_LOSS}",
        series,
        log_across=True,
        unit_across="",
        note="First round of the search: every rate trained equally long. The values name the "
        "chosen rate. A flat curve forgives a wrong rate.",
    )


def _searched(look: int, variant: VariantResult) -> Series:
    shortest = min((trial.steps for trial in variant.search), default=0)
    best: dict[float, float] = {}
    for trial in variant.search:
        if trial.steps == shortest and trial.loss is not None:
            best[trial.lr] = min(trial.loss, best.get(trial.lr, trial.loss))
    points = tuple(
        Point(lr, loss, text="(chosen)" if lr == variant.lr else "")
        for lr, loss in sorted(best.items())
    )
    return Series(variant.label, points, look, markers=True)


def scores(variant: VariantResult, metric: str, *, share: bool = False) -> str:
    """A metric's mean, its interval on a second line."""
    estimate = variant.estimates.get(metric)
    if estimate is None:
        return "–"
    form = percent if share else significant
    text = form(estimate.mean)
    if estimate.low is None or estimate.high is None:
        return text
    low, high = possible_interval(metric, estimate)
    return f"{text}\n{form(low)} to {form(high)}"
