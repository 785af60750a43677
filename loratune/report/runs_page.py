"""Several runs on one page: what they scored and cost, and where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from statistics import median_high

from loratune.config.convert import flatten
from loratune.report.charts.chart_frame import Chart, drawn
from loratune.report.charts.line import line_chart
from loratune.report.charts.scatter import quality_charts
from loratune.report.charts.series import Point, Series, condensed, single
from loratune.report.page import Page, Section
from loratune.report.records import RunRecords
from loratune.tables import Cell, Table
from loratune.units import byte_size, duration, percent, significant

Runs = Mapping[str, RunRecords]
"""Runs by a short unique name."""

_LOSS = "evaluation loss, nats per token"
_UNREMARKABLE = ("name", "out", "resume", "stages", "trackers", "allow_drift", "trainer.seed")


def runs_page(runs: Sequence[RunRecords], footer: str) -> Page:
    """The page of several runs, in the order given."""
    named = dict(zip(_names(runs), runs, strict=True))
    losses = {name: run.evaluation_loss for name, run in named.items()}
    measured = [(loss, name) for name, loss in losses.items() if loss is not None]
    order = [name for _, name in sorted(measured, key=itemgetter(0))]
    return Page(
        kicker=f"loratune · {len(runs)} runs",
        title=", ".join(named),
        verdict=tuple(_verdict(named, order)),
        warnings=tuple(_cautions(named)),
        cards=(),
        sections=(
            Section("scores", "Scores and costs", tables=(_scores(named, order),)),
            Section("pareto", "Quality against cost", charts=_pareto(named)),
            Section("curves", "Evaluation loss", charts=_curves(named)),
            Section("settings", "Where the recipes differ", tables=_differing(named)),
            Section("samples", "Answers", samples=_samples(named)),
        ),
        footer=footer,
    )


def _names(runs: Sequence[RunRecords]) -> list[str]:
    """A short unique name a run: its variant where that tells them apart, else its folder too."""
    variants = [run.variant for run in runs]
    if len(set(variants)) == len(runs):
        return variants
    names = [f"{run.variant} · {run.path.resolve().name}" for run in runs]
    if len(set(names)) == len(runs):
        return names
    return [f"{run.variant} · {run.path}" for run in runs]


def _verdict(runs: Runs, order: Sequence[str]) -> list[str]:
    """What the loss says, lowest first, and from which runs exact match cannot tell the best."""
    if not order:
        return ["No run was evaluated, so there is nothing to choose between."]
    best, *others = order
    loss = significant(runs[best].evaluation_loss)
    text = f"Lowest evaluation loss: {best}, {loss} nats per token"
    if others:
        text += f", before {others[0]} with {significant(runs[others[0]].evaluation_loss)}"
    same = [name for name in runs if name != best and _overlap(runs[name], runs[best])]
    if not same:
        return [f"{text}."]
    exact = f"By exact match it cannot be told from {', '.join(same)}: the 95 % intervals overlap."
    return [f"{text}.", exact]


def _overlap(one: RunRecords, other: RunRecords) -> bool:
    first, second = one.exact_interval, other.exact_interval
    if first is None or second is None:
        return False
    return first[0] <= second[1] and second[0] <= first[1]


def _cautions(runs: Runs) -> list[str]:
    lines = []
    for key, what in (("base", "base models"), ("data", "rows")):
        if len({run.fingerprints.get(key) for run in runs.values()}) > 1:
            lines.append(f"These runs have different {what}: their scores do not compare.")
    unfinished = [name for name, run in runs.items() if not run.summary]
    if unfinished:
        lines.append(f"Not complete: {', '.join(unfinished)}.")
    lines.append(
        "Each run is one seed with the rate its recipe gave it, so small differences may be luck. "
        "loratune compare searches the rates, repeats the seeds and tests the differences."
    )
    return lines


def _scores(runs: Runs, order: Sequence[str]) -> Table:
    rows = [_row(run, name) for name, run in runs.items()]
    return Table(
        "scores",
        tuple(rows[0]),
        tuple(tuple(row.values()) for row in rows),
        caption="One line a run; the lowest loss is shaded.",
        marked=frozenset(number for number, name in enumerate(runs) if name in order[:1]),
    )


def _row(run: RunRecords, name: str) -> dict[str, Cell]:
    adapted, own, interval = run.adapted, run.own_count, run.exact_interval
    seconds = run.history.values("train/step_seconds")
    rates = run.history.values("train/lr")
    return {
        "run": name,
        "rank": run.setting("adapter.rank"),
        "learning rate": significant(max(rates, default=None), 3),
        "seed": run.setting("trainer.seed", 0),
        "steps": run.last_step,
        "trainable": own.get("trainable"),
        "stored bytes": own.get("stored_bytes"),
        "evaluation loss": significant(run.evaluation_loss),
        "exact match": percent(adapted.get("exact_match")),
        "95 % interval": None if interval is None else f"{interval[0]:.0%} to {interval[1]:.0%}",
        "token accuracy": percent(adapted.get("token_accuracy")),
        "step time": duration(median_high(seconds) if seconds else None),
        "peak memory": byte_size(run.peak_bytes),
    }


def _pareto(runs: Runs) -> tuple[Chart, ...]:
    trained, peaks = [], []
    for look, (name, run) in enumerate(runs.items()):
        loss, trainable = run.evaluation_loss, run.own_count.get("trainable")
        if loss is not None and trainable is not None:
            trained.append(single(name, Point(4.0 * trainable, loss), look))
        if loss is not None and run.peak_bytes:
            peaks.append(single(name, Point(run.peak_bytes, loss), look))
    return quality_charts(_LOSS, trained, peaks, "peak memory")


def _curves(runs: Runs) -> tuple[Chart, ...]:
    held_out, training = [], []
    for look, (name, run) in enumerate(runs.items()):
        points = condensed(run.history.pairs("eval/loss"))
        held_out.append(Series(name, points, look, markers=len(points) <= 12))
        means = (Point(point.x, point.y) for point in condensed(run.history.pairs("train/loss")))
        training.append(Series(name, tuple(means), look))
    return drawn(
        line_chart("Evaluation loss against steps", "optimizer steps", _LOSS, held_out),
        line_chart(
            "Training loss against steps",
            "optimizer steps",
            "loss, nats per token",
            training,
            note="Means of stretches of steps.",
        ),
    )


def _differing(runs: Runs) -> tuple[Table, ...]:
    recipes = [flatten(run.recipe) for run in runs.values()]
    rows = []
    for key in dict.fromkeys(key for recipe in recipes for key in recipe):
        values = [str(recipe.get(key, "–")) for recipe in recipes]
        if len(set(values)) > 1 and key not in _UNREMARKABLE:
            rows.append((key, *values))
    if not rows:
        return ()
    left = (False,) * (len(runs) + 1)
    return (Table("settings", ("setting", *runs), tuple(rows), numeric=left),)


def _samples(runs: Runs) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Prompts that every run answered."""
    answered = [
        {str(sample["prompt"]): sample for sample in run.evaluation.get("samples") or []}
        for run in runs.values()
    ]
    shared = [prompt for prompt in answered[0] if all(prompt in one for one in answered)]
    return tuple(
        (
            ("prompt", prompt.strip()),
            ("reference", str(answered[0][prompt].get("reference", "")).strip()),
            ("base", str(answered[0][prompt].get("base", "")).strip()),
            *(
                (name, str(samples[prompt].get("adapted", "")).strip())
                for name, samples in zip(runs, answered, strict=True)
            ),
        )
        for prompt in shared
    )
