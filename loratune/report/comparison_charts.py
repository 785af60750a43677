"""The drawings of a comparison; a variant has the same colour, dash and marker in all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from loratune.compare.metrics import metric_of, possible_interval
from loratune.compare.result import Comparison, CurvePoint, VariantResult
from loratune.compare.verdict import Choice
from loratune.report.charts.chart_frame import Chart, drawn
from loratune.report.charts.interval import Interval, interval_chart
from loratune.report.charts.line import line_chart
from loratune.report.charts.scatter import quality_charts
from loratune.report.charts.series import Point, Series, single

_LOSS = "loss, nats per token"
_MOST_PAIRS = 10


def pareto_charts(comparison: Comparison) -> tuple[Chart, ...]:
    """Quality against trainable bytes, memory and time."""
    looks = list(enumerate(comparison.variants))
    trained = [_quality(look, variant, 4.0 * variant.costs.trainable) for look, variant in looks]
    peaks = [
        _quality(look, variant, variant.estimates["peak_bytes"].mean)
        for look, variant in looks
        if "peak_bytes" in variant.estimates
    ]
    memory, note = "peak memory of a training step", "Whiskers: 95 % interval. "
    seconds = [
        _quality(
            look,
            variant,
            variant.estimates["step_seconds"].mean * (variant.steps or comparison.steps),
        )
        for look, variant in looks
        if "step_seconds" in variant.estimates
    ]
    return quality_charts(_LOSS, trained, peaks, memory, note, seconds)


def _quality(look: int, variant: VariantResult, cost: float) -> Series:
    estimate = variant.estimates.get("loss")
    if estimate is None or cost <= 0:
        return Series(variant.label, (), look)
    low, high = estimate.low, estimate.high
    if low is not None and high is not None:
        low, high = possible_interval("loss", low, high)
    return single(variant.label, Point(cost, estimate.mean, low, high), look)


def difference_charts(comparison: Comparison, choice: Choice | None) -> tuple[Chart, ...]:
    """Every pair's difference with its interval; with many variants, those with the best one."""
    best = choice.best.label if choice else ""
    return drawn(
        _differences(comparison, best, "loss", _LOSS, "Left"),
        _differences(comparison, best, "exact_match", "share of prompts", "Right"),
        *(
            _differences(comparison, best, name, metric_of(name).name, "Right")
            for name in comparison.text_metrics
        ),
    )


def _differences(
    comparison: Comparison, best: str, metric: str, unit: str, better: str
) -> Chart | None:
    pairs = [d for d in comparison.differences if d.metric == metric]
    if len(pairs) > _MOST_PAIRS:
        pairs = [d for d in pairs if best in (d.first, d.second)]
    intervals = [
        Interval(f"{d.first} − {d.second}", d.difference, d.low, d.high, d.significant, d.words)
        for d in pairs
    ]
    return interval_chart(
        f"Differences in {metric_of(metric).name}",
        f"difference in {unit}",
        intervals,
        note=f"{better} of zero: the first is better. Hollow: not told from zero after correction "
        "for the number of pairs.",
    )


def curve_charts(comparison: Comparison) -> tuple[Chart, ...]:
    """Dev loss of every variant against steps, tokens and seconds: mean and range over seeds."""
    axes = (
        ("Loss against steps", "optimizer steps", "step"),
        ("Loss against tokens", "answer tokens seen", "tokens"),
        ("Loss against time", "seconds in optimizer steps", "seconds"),
    )
    return drawn(
        *(
            line_chart(
                title,
                across,
                f"dev {_LOSS}",
                [_curve(look, v, key) for look, v in enumerate(comparison.variants)],
                note="Line: mean over seeds; band: lowest to highest seed.",
            )
            for title, across, key in axes
        )
    )


def _curve(look: int, variant: VariantResult, key: str) -> Series:
    by_step: dict[int, list[CurvePoint]] = {}
    for run in variant.members:
        for point in run.curve:
            by_step.setdefault(point.step, []).append(point)
    means = (_mean_point(measured, key) for _, measured in sorted(by_step.items()))
    points = tuple(point for point in means if point is not None)
    return Series(variant.label, points, look, markers=len(points) <= 12)


def _mean_point(measured: Iterable[CurvePoint], key: str) -> Point | None:
    """The mean over seeds and, where there are several, the range."""
    pairs = [(getattr(p, key), p.dev_loss) for p in measured if p.dev_loss is not None]
    if not pairs:
        return None
    losses = [loss for _, loss in pairs]
    across = fmean(place for place, _ in pairs)
    if len(losses) == 1:
        return Point(across, losses[0])
    return Point(across, fmean(losses), min(losses), max(losses))


def search_charts(comparison: Comparison) -> tuple[Chart, ...]:
    """How the loss depends on the learning rate: after the first round, and over its whole length.

    A contender's rounds are its own: one with fewer steps has shorter ones.
    """
    looks = list(enumerate(comparison.variants))
    halved = any(len({trial.steps for trial in v.search}) > 1 for v in comparison.variants)
    last = "Every rate that reached the last round of the search, over its whole length. "
    charts = [_search_chart("Learning-rate sensitivity", max, looks, last)]
    if halved:
        first = "First round of the search: every rate trained equally long. "
        charts.insert(0, _search_chart("Learning-rate sensitivity, first round", min, looks, first))
    return drawn(*charts)


def _search_chart(
    title: str,
    length: Callable[[Iterable[int]], int],
    looks: Sequence[tuple[int, VariantResult]],
    note: str,
) -> Chart | None:
    return line_chart(
        title,
        "learning rate",
        f"dev {_LOSS}",
        [_searched(look, variant, length) for look, variant in looks],
        log_across=True,
        unit_across="",
        note=f"{note}The values name the chosen rate; a cross at the top is a training that "
        "failed. A flat curve forgives a wrong rate.",
    )


def _searched(look: int, variant: VariantResult, length: Callable[[Iterable[int]], int]) -> Series:
    """The dev loss of every rate after one round, and the rates that only failed in it."""
    steps = length([trial.steps for trial in variant.search] or [0])
    trials = [trial for trial in variant.search if trial.steps == steps]
    best: dict[float, float] = {}
    for trial in trials:
        if trial.loss is not None:
            best[trial.lr] = min(trial.loss, best.get(trial.lr, trial.loss))
    points = tuple(
        Point(lr, loss, text="(chosen)" if lr == variant.lr else "")
        for lr, loss in sorted(best.items())
    )
    failed = {t.lr: t.reason for t in trials if t.loss is None and t.lr not in best}
    return Series(variant.label, points, look, markers=True, failed=failed)
