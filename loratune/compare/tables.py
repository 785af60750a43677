"""A comparison as tables for a terminal, as Markdown and as CSV; text from data stays text."""

from __future__ import annotations

import re

from loratune.compare.result import Comparison, VariantResult
from loratune.compare.words import BY_KEY, METRICS, p_value, possible_interval
from loratune.console import printable
from loratune.counting.tables import Cell, Grid, to_csv, to_markdown

NOTHING = "-"
_SHOWN_PAIRS = ("loss", "exact_match", "forgetting")


def quality_grid(comparison: Comparison) -> Grid:
    """What each setting reached, with 95 % intervals."""
    measured = [
        metric
        for metric in METRICS
        if metric.key != "token_accuracy"
        and any(metric.key in variant.estimates for variant in comparison.variants)
    ]
    target = comparison.target_loss
    reached = NOTHING if target is None else f"{target:.3f}"
    columns = (
        "variant", "lr", *(f"{metric.name} [95 % CI]" for metric in measured),
        f"steps to dev loss {reached}", "seconds to it",
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = [
        (
            variant.label, _rate(variant),
            *(_with_interval(variant, metric.key) for metric in measured),
            _plain(variant, "steps_to_target", "{:.1f}"),
            _plain(variant, "seconds_to_target", "{:.2f}"),
        )
        for variant in comparison.variants
    ]  # fmt: skip
    base = comparison.base
    shown = {"loss": base.loss, "exact_match": base.exact_match}
    values = [shown.get(metric.key) for metric in measured]
    cells = [
        NOTHING if value is None else metric.shown(value)
        for metric, value in zip(measured, values, strict=True)
    ]
    rows.append(("(base)", NOTHING, *cells, NOTHING, NOTHING))
    rows_used = comparison.rows
    title = (
        f"{comparison.name}: {rows_used.test:,} final rows, {comparison.steps:,} steps, "
        f"seeds {', '.join(map(str, comparison.seeds))}, matched by {comparison.match}"
    )
    return Grid(printable(title), columns, tuple(rows))


def cost_grid(comparison: Comparison) -> Grid:
    """What each setting costs: counted, and measured."""
    columns = (
        "variant", "rank", "trainable", "% of base", "stored bytes", "optimizer bytes",
        "activation bytes/token", "peak MB", "ms/step", "merge residual",
    )  # fmt: skip
    return Grid("costs", columns, tuple(_cost_row(variant) for variant in comparison.variants))


def _cost_row(variant: VariantResult) -> tuple[Cell, ...]:
    costs = variant.costs
    kept = costs.activation_bytes_per_token
    return (
        variant.label, costs.rank, costs.trainable, round(costs.percent_of_base, 4),
        costs.stored_bytes, costs.optimizer_bytes, NOTHING if kept is None else round(kept),
        _plain(variant, "peak_bytes", "{:.2f}", 1e-6),
        _plain(variant, "step_seconds", "{:.1f}", 1e3),
        _plain(variant, "merge_residual", "{:.1e}"),
    )  # fmt: skip


def difference_grid(comparison: Comparison, metrics: tuple[str, ...] = _SHOWN_PAIRS) -> Grid:
    """Every pair, first minus second, paired by prompt and seed."""
    rows = tuple(
        (
            BY_KEY[one.metric].name,
            f"{one.first} - {one.second}",
            BY_KEY[one.metric].signed(one.difference),
            BY_KEY[one.metric].span(one.low, one.high),
            p_value(one.p_holm),
            "significant" if one.significant else "no significant difference",
        )
        for one in comparison.differences
        if one.metric in metrics
    )
    columns = ("metric", "pair", "difference", "95 % CI", "p (Holm)", "verdict")
    return Grid("differences, paired by prompt and seed", columns, rows)


def search_grid(comparison: Comparison) -> Grid:
    """Every rate of every search, with its dev loss on each rung."""
    rows: list[tuple[Cell, ...]] = []
    rungs = sorted({trial.steps for v in comparison.variants for trial in v.search})
    for variant in comparison.variants:
        points = sorted({(t.lr_ratio or 0.0, t.lr) for t in variant.search})
        for ratio, lr in points:
            by_steps = {
                trial.steps: trial
                for trial in variant.search
                if (trial.lr_ratio or 0.0, trial.lr) == (ratio, lr)
            }
            losses = [_trial(by_steps[steps]) if steps in by_steps else "" for steps in rungs]
            chosen = lr == variant.lr and (variant.lr_ratio or 0.0) == ratio
            shown = f"{lr:g}" + (f" x {ratio:g}" if ratio else "")
            rows.append((variant.label, shown, *losses, "chosen" if chosen else ""))
    columns = ("variant", "lr", *(f"dev loss, {steps} steps" for steps in rungs), "")
    return Grid("learning-rate search (successive halving)", columns, tuple(rows))


def _trial(trial: object) -> str:
    loss = getattr(trial, "loss", None)
    return "failed" if loss is None else f"{loss:.4f}"


def _rate(variant: VariantResult) -> str:
    if variant.lr is None:
        return "failed"
    return f"{variant.lr:g}" + (f" x {variant.lr_ratio:g}" if variant.lr_ratio else "")


def _with_interval(variant: VariantResult, key: str) -> str:
    estimate = variant.estimates.get(key)
    if estimate is None:
        return NOTHING
    shown = BY_KEY[key].shown
    text = shown(estimate.mean)
    if estimate.low is None or estimate.high is None:
        return text
    low, high = possible_interval(key, estimate)
    return f"{text} [{shown(low)}, {shown(high)}]"


def _plain(variant: VariantResult, key: str, form: str, factor: float = 1.0) -> str:
    estimate = variant.estimates.get(key)
    if estimate is None:
        return NOTHING
    missing = len([m for m in variant.members if not m.reason]) - estimate.seeds
    note = f" ({estimate.seeds} of {estimate.seeds + missing} seeds)" if missing else ""
    return form.format(estimate.mean * factor) + note


def markdown(comparison: Comparison) -> str:
    """The whole comparison as a Markdown page."""
    machine = comparison.provenance
    versions = machine.get("versions", {})
    rows = comparison.rows
    facts = [
        f"Written {comparison.created} on {machine.get('processor', 'unknown')} "
        f"({machine.get('cores', '?')} cores, {machine.get('threads', '?')} threads, "
        f"{machine.get('device', '?')}), torch {versions.get('torch', '?')}; "
        f"{comparison.seconds:.0f} s of work.",
        f"Base {comparison.base.path} ({comparison.base.parameters:,} parameters). "
        f"{rows.train:,} training rows, {rows.dev:,} rows to choose the rate by, {rows.test:,} "
        f"final rows with {rows.prompts:,} prompts, {rows.heldout:,} held-out texts.",
    ]
    grids = [quality_grid(comparison), cost_grid(comparison)]
    grids += [difference_grid(comparison, tuple(BY_KEY)), search_grid(comparison)]
    parts = [f"# Comparison {_escaped(comparison.name)}", *map(_escaped, facts)]
    parts.append("\n".join(f"- {_escaped(line)}" for line in comparison.findings))
    parts += [to_markdown(_escaped_grid(grid)) for grid in grids]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def csv(comparison: Comparison) -> str:
    """Quality and costs, for a spreadsheet."""
    return "\n".join(to_csv(grid) for grid in (quality_grid(comparison), cost_grid(comparison)))


def _escaped_grid(grid: Grid) -> Grid:
    # to_markdown escapes the bars itself.
    rows = tuple(
        tuple(_escaped(cell, "") if isinstance(cell, str) else cell for cell in row)
        for row in grid.rows
    )
    return Grid(_escaped(grid.title), tuple(_escaped(name) for name in grid.columns), rows)


def _escaped(text: str, more: str = "|") -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no line breaks."""
    plain = " ".join(printable(text).split())
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(rf"([\\`*_\[\]#!{more}])", r"\\\1", plain)


def screen(comparison: Comparison) -> list[Grid]:
    """The tables for a terminal."""
    grids = [search_grid(comparison), cost_grid(comparison), quality_grid(comparison)]
    return [*grids, difference_grid(comparison)] if comparison.differences else grids
