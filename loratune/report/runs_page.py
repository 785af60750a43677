"""Several runs on one page: what they scored and cost, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_high
from typing import Any

from loratune.compare.statistics import share_interval
from loratune.report.charts.chart_frame import Chart
from loratune.report.charts.line import line_chart
from loratune.report.charts.scatter import scatter_chart
from loratune.report.charts.series import Point, Series, condensed
from loratune.report.page import Page, Section
from loratune.report.records import RunRecords
from loratune.tables import Cell, Table
from loratune.units import byte_size, duration, percent, significant

_LOSS = "evaluation loss, nats per token"
_UNREMARKABLE = ("name", "out", "resume", "stages", "trackers", "allow_drift", "trainer.seed")


def runs_page(runs: Sequence[RunRecords], footer: str) -> Page:
    """The page of several runs, in the order given."""
    names = run_names(runs)
    order = sorted(
        (n for n in range(len(runs)) if loss_of(runs[n]) is not None), key=_by_loss(runs)
    )
    best = order[0] if order else None
    return Page(
        kicker=f"loratune · {len(runs)} runs",
        title=", ".join(names),
        verdict=tuple(_verdict(runs, names, order)),
        warnings=tuple(_cautions(runs, names)),
        cards=(),
        sections=(
            Section("scores", "Scores and costs", tables=(_scores(runs, names, best),)),
            Section("pareto", "Quality against cost", charts=_pareto(runs, names)),
            Section("curves", "Evaluation loss", charts=_curves(runs, names)),
            Section("settings", "Where the recipes differ", tables=_differing(runs, names)),
            Section("samples", "Answers", samples=_samples(runs, names)),
        ),
        footer=footer,
    )


def run_names(runs: Sequence[RunRecords]) -> list[str]:
    """A short unique name a run: its variant where that tells them apart, else its folder too."""
    variants = [run.variant for run in runs]
    if len(set(variants)) == len(runs):
        return variants
    names = [f"{run.variant} · {run.path.resolve().name}" for run in runs]
    if len(set(names)) == len(runs):
        return names
    return [f"{run.variant} · {run.path}" for run in runs]


def loss_of(run: RunRecords) -> float | None:
    """Its evaluation loss: of the adapter it kept, else the best on the way."""
    adapted = run.evaluation.get("adapted") or {}
    if adapted.get("loss") is not None:
        return float(adapted["loss"])
    return min(run.history.values("eval/loss"), default=None)


def _by_loss(runs: Sequence[RunRecords]) -> Any:
    return lambda number: loss_of(runs[number])


def _verdict(runs: Sequence[RunRecords], names: list[str], order: list[int]) -> list[str]:
    if not order:
        return ["No run was evaluated, so there is nothing to choose between."]
    best = order[0]
    text = (
        f"Lowest evaluation loss: {names[best]}, {significant(loss_of(runs[best]))} nats per token"
    )
    if len(order) > 1:
        second = order[1]
        text += f", before {names[second]} with {significant(loss_of(runs[second]))}"
    texts = [f"{text}."]
    texts += _overlapping(runs, names, best)
    return texts


def _overlapping(runs: Sequence[RunRecords], names: list[str], best: int) -> list[str]:
    intervals = [_exact_interval(run) for run in runs]
    mine = intervals[best]
    if mine is None:
        return []
    same = [
        names[n]
        for n, other in enumerate(intervals)
        if n != best and other is not None and other[0] <= mine[1] and mine[0] <= other[1]
    ]
    if not same:
        return []
    return [f"By exact match it cannot be told from {', '.join(same)}: the 95 % intervals overlap."]


def _exact_interval(run: RunRecords) -> tuple[float, float] | None:
    adapted = run.evaluation.get("adapted") or {}
    share, prompts = adapted.get("exact_match"), adapted.get("prompts") or 0
    return None if share is None or not prompts else share_interval(share * prompts, prompts)


def _cautions(runs: Sequence[RunRecords], names: list[str]) -> list[str]:
    lines = []
    for key, what in (("base", "base models"), ("data", "rows")):
        prints = {(run.provenance.get("fingerprints") or {}).get(key) for run in runs}
        if len(prints) > 1:
            lines.append(f"These runs have different {what}: their scores do not compare.")
    unfinished = [name for name, run in zip(names, runs, strict=True) if not run.summary]
    if unfinished:
        lines.append(f"Not complete: {', '.join(unfinished)}.")
    lines.append(
        "Each run is one seed with the rate its recipe gave it, so small differences may be luck. "
        "loratune compare searches the rates, repeats the seeds and tests the differences."
    )
    return lines


def _scores(runs: Sequence[RunRecords], names: list[str], best: int | None) -> Table:
    rows = [_row(run, name) for run, name in zip(runs, names, strict=True)]
    return Table(
        "scores",
        tuple(rows[0]),
        tuple(tuple(row.values()) for row in rows),
        caption="One line a run; the lowest loss is shaded.",
        marked=frozenset(() if best is None else {best}),
    )


def _row(run: RunRecords, name: str) -> dict[str, Cell]:
    adapted, own = run.evaluation.get("adapted") or {}, run.own_count
    interval = _exact_interval(run)
    seconds = run.history.values("train/step_seconds")
    rates = run.history.values("train/lr")
    return {
        "run": name,
        "rank": run.setting("adapter.rank"),
        "learning rate": significant(max(rates, default=None), 3),
        "seed": run.setting("trainer.seed", 0),
        "steps": max((row["step"] for row in run.history.metrics), default=0),
        "trainable": own.get("trainable"),
        "stored bytes": own.get("stored_bytes"),
        "evaluation loss": significant(loss_of(run)),
        "exact match": percent(adapted.get("exact_match")),
        "95 % interval": None if interval is None else f"{interval[0]:.0%} to {interval[1]:.0%}",
        "token accuracy": percent(adapted.get("token_accuracy")),
        "step time": duration(median_high(seconds) if seconds else None),
        "peak memory": byte_size(run.peak_bytes),
    }


def _pareto(runs: Sequence[RunRecords], names: list[str]) -> tuple[Chart, ...]:
    note = "Lower left is better. Dashed: what nothing beats on both."
    trained, peaks = [], []
    for look, (run, name) in enumerate(zip(runs, names, strict=True)):
        loss, own = loss_of(run), run.own_count
        if loss is None:
            continue
        if own:
            point = Point(4.0 * own["trainable"], loss)
            trained.append(Series(name, (point,), look, line=False, markers=True))
        if run.peak_bytes:
            point = Point(run.peak_bytes, loss)
            peaks.append(Series(name, (point,), look, line=False, markers=True))
    across = "trainable bytes (fp32)"
    charts = (
        scatter_chart("Quality against trainable bytes", across, _LOSS, trained, note=note),
        scatter_chart("Quality against memory", "peak memory", _LOSS, peaks, note=note),
    )
    return tuple(chart for chart in charts if chart is not None)


def _curves(runs: Sequence[RunRecords], names: list[str]) -> tuple[Chart, ...]:
    held_out, training = [], []
    for look, (run, name) in enumerate(zip(runs, names, strict=True)):
        points = condensed(run.history.pairs("eval/loss"))
        held_out.append(Series(name, points, look, markers=len(points) <= 12))
        means = (Point(point.x, point.y) for point in condensed(run.history.pairs("train/loss")))
        training.append(Series(name, tuple(means), look))
    charts = (
        line_chart("Evaluation loss against steps", "optimizer steps", _LOSS, held_out),
        line_chart(
            "Training loss against steps",
            "optimizer steps",
            "loss, nats per token",
            training,
            note="Means of stretches of steps.",
        ),
    )
    return tuple(chart for chart in charts if chart is not None)


def _differing(runs: Sequence[RunRecords], names: list[str]) -> tuple[Table, ...]:
    flat = [_flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = []
    for key in keys:
        values = [str(one.get(key, "–")) for one in flat]
        if len(set(values)) > 1 and key not in _UNREMARKABLE:
            rows.append((key, *values))
    if not rows:
        return ()
    left = (False,) * (len(names) + 1)
    return (Table("settings", ("setting", *names), tuple(rows), numeric=left),)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _samples(
    runs: Sequence[RunRecords], names: list[str]
) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Prompts that every run answered."""
    answered = [
        {str(sample["prompt"]): sample for sample in run.evaluation.get("samples") or []}
        for run in runs
    ]
    if not all(answered):
        return ()
    shared = [prompt for prompt in answered[0] if all(prompt in one for one in answered)]
    return tuple(
        (
            ("prompt", prompt.strip()),
            ("reference", str(answered[0][prompt].get("reference", "")).strip()),
            ("base", str(answered[0][prompt].get("base", "")).strip()),
            *(
                (n, str(a[prompt].get("adapted", "")).strip())
                for n, a in zip(names, answered, strict=True)
            ),
        )
        for prompt in shared
    )
