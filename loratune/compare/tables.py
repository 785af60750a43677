"""A comparison as tables: quality, costs, every difference, every trial; and as a Markdown page."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from loratune.adapters.registry import config_class, variant_names
from loratune.compare.metrics import metric_of, metrics_with, p_value, verdict_word
from loratune.compare.result import Comparison, Trial, VariantResult
from loratune.compare.verdict import Choice, choose, difference, verdict
from loratune.tables import Cell, Table, markdown_text
from loratune.units import byte_size, duration, significant

_IN_A_TERMINAL = ("loss", "exact_match", "forgetting")
_COUNTED = (
    "variant",
    "rank",
    "trainable",
    "% of base",
    "stored bytes",
    "optimizer bytes",
    "activation bytes a token",
)
_three_digits = partial(significant, digits=3)
_MEASURED: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("peak_bytes", "peak bytes", byte_size),
    ("step_seconds", "seconds a step", duration),
    ("steps_to_target", "steps to target", _three_digits),
    ("seconds_to_target", "seconds to it", duration),
    ("forgetting_at_target", "forgetting there", "{:+.4f}".format),
    ("merge_residual", "merge residual", "{:.1e}".format),
)
"""Estimate, heading and format of what is measured."""


def quality_table(comparison: Comparison) -> Table:
    """What each setting reached, with 95 % intervals, and the base."""
    metrics = metrics_with(comparison.text_metrics)
    measured = [m for m in metrics if any(m.key in v.estimates for v in comparison.variants)]
    choice = choose(comparison)
    rows: list[tuple[Cell, ...]] = [
        (
            variant.label,
            _rate(variant),
            *(
                metric.with_interval(variant.estimates[metric.key])
                if metric.key in variant.estimates
                else None
                for metric in measured
            ),
            _against_best(comparison, choice, variant),
        )
        for variant in comparison.variants
    ]
    text = comparison.base.text
    base = [text.get(m.key, getattr(comparison.base, m.key, None)) for m in measured]
    cells = [None if v is None else m.text(v) for m, v in zip(measured, base, strict=True)]
    rows.append(("(base)", None, *cells, None))
    counts = comparison.rows
    return Table(
        f"{comparison.name}: {counts.test:,} final rows, {comparison.steps:,} steps, "
        f"seeds {', '.join(map(str, comparison.seeds))}, matched by {comparison.match}",
        ("variant", "lr", *(f"{m.name} [95 % CI]" for m in measured), "loss against the best"),
        tuple(rows),
        caption="Means over seeds with 95 % intervals; loss and forgetting in nats per token. "
        "Each p is corrected for the number of pairs (Holm), the intervals are not. "
        "The variant to choose is marked.",
        marked=_marked(comparison, choice),
    )


def _marked(comparison: Comparison, choice: Choice | None) -> frozenset[int]:
    chosen = choice.chosen if choice else None
    return frozenset(n for n, variant in enumerate(comparison.variants) if variant is chosen)


def _against_best(comparison: Comparison, choice: Choice | None, variant: VariantResult) -> str:
    if choice is None or "loss" not in variant.estimates:
        return "failed"
    if variant is choice.best:
        return "lowest"
    test = difference(comparison, choice.best.label, variant.label, "loss")
    if test is None:
        return "not tested"
    word = "no significant difference"
    if test.significant:
        word = "worse" if variant in choice.worse else "higher, yet as good"
    return f"{word}\n(p {p_value(test.p_holm)})"


def cost_table(comparison: Comparison) -> Table:
    """What each setting costs: counted, and measured."""
    base = _base_activations(comparison)
    caption = "Activations: what autograd keeps because of the adapter."
    caption += "" if base is None else f" The frozen base itself keeps {byte_size(base)} a token."
    if any("merge_residual" in variant.estimates for variant in comparison.variants):
        caption += (
            " Merge residual: ‖(W' - W) - ΔW‖ / ‖ΔW‖ of the worst layer, merged in the base's"
            " dtype: the share that rounding takes away."
        )
    target = f"steps to dev loss {significant(comparison.target_loss)}"
    names = [target if key == "steps_to_target" else heading for key, heading, _ in _MEASURED]
    formats: dict[str, Callable[[float], str]] = {
        "% of base": significant,
        "activation bytes a token": byte_size,
        **{name: form for name, (_, _, form) in zip(names, _MEASURED, strict=True)},
    }
    return Table(
        "costs",
        (*_COUNTED, *names),
        tuple(_cost_row(variant) for variant in comparison.variants),
        formats=formats,
        caption=caption,
        marked=_marked(comparison, choose(comparison)),
    )


def _base_activations(comparison: Comparison) -> float | None:
    sizes = (variant.costs.base_activation_bytes_per_token for variant in comparison.variants)
    return next((size for size in sizes if size is not None), None)


def _cost_row(variant: VariantResult) -> tuple[Cell, ...]:
    costs = variant.costs
    return (
        variant.label,
        _rank(variant),
        costs.trainable,
        costs.percent_of_base,
        costs.stored_bytes,
        costs.optimizer_bytes,
        costs.activation_bytes_per_token,
        *(_mean(variant, key, form) for key, _, form in _MEASURED),
    )


def _rank(variant: VariantResult) -> int | None:
    """The rank, of variants that have one; a file may be of a variant that is not installed."""
    is_installed = variant.variant in variant_names()
    has_none = is_installed and "rank" in config_class(variant.variant).without_effect
    return None if has_none else variant.costs.rank


def _mean(variant: VariantResult, key: str, form: Callable[[float], str]) -> Cell:
    """A mean over seeds; where some of them have no value, with how many have one."""
    estimate = variant.estimates.get(key)
    if estimate is None:
        return None
    seeds = sum(not run.reason for run in variant.members)
    if estimate.seeds >= seeds:
        return estimate.mean
    return f"{form(estimate.mean)}\n({estimate.seeds} of {seeds} seeds)"


def difference_table(comparison: Comparison, metrics: tuple[str, ...] = ()) -> Table:
    """Every pair, first minus second, paired by prompt and seed; of all metrics where none are."""
    rows = tuple(
        (
            metric_of(one.metric).name,
            f"{one.first} - {one.second}",
            metric_of(one.metric).signed(one.difference),
            metric_of(one.metric).span(one.low, one.high),
            p_value(one.p_holm),
            None if one.p_equivalence is None else p_value(one.p_equivalence),
            verdict_word(one),
        )
        for one in comparison.differences
        if not metrics or one.metric in metrics
    )
    columns = (
        "metric",
        "pair",
        "difference",
        "95 % CI",
        "p (Holm)",
        "p (equivalence)",
        "verdict",
    )
    caption = (
        "Equivalent: two one-sided tests show that the difference is below "
        f"{comparison.margin:.2%} of the best one's gain over the base (of the loss's gain for "
        "forgetting). Both p-values are those after Holm's correction. Undecided: neither a "
        "difference nor its absence is shown."
    )
    return Table("differences, paired by prompt and seed", columns, rows, caption=caption)


def search_table(comparison: Comparison) -> Table:
    """Every rate of every search, with its dev loss after each length of training."""
    lengths = sorted({trial.steps for v in comparison.variants for trial in v.search})
    rows: list[tuple[Cell, ...]] = []
    for variant in comparison.variants:
        trials = {(_setting(trial), trial.steps): trial for trial in variant.search}
        for setting in sorted({setting for setting, _ in trials}):
            tried = [trials.get((setting, steps)) for steps in lengths]
            chosen = setting == (variant.lr_ratio or 0.0, variant.lr)
            reasons = dict.fromkeys(trial.reason for trial in tried if trial and trial.reason)
            rows.append(
                (
                    variant.label,
                    _rate_text(setting[1], setting[0]),
                    *("" if trial is None else _dev_loss(trial) for trial in tried),
                    "chosen" if chosen else "; ".join(reasons),
                )
            )
    columns = ("variant", "lr", *(f"dev loss, {steps} steps" for steps in lengths), "")
    return Table("learning-rate search (successive halving)", columns, tuple(rows))


def _setting(trial: Trial) -> tuple[float, float]:
    return trial.lr_ratio or 0.0, trial.lr


def _dev_loss(trial: Trial) -> str:
    return "failed" if trial.loss is None else f"{trial.loss:.4f}"


def _rate(variant: VariantResult) -> str:
    return "failed" if variant.lr is None else _rate_text(variant.lr, variant.lr_ratio)


def _rate_text(rate: float, ratio: float | None) -> str:
    return f"{rate:g}" + (f" x {ratio:g}" if ratio else "")


def _facts(comparison: Comparison) -> list[str]:
    """Where, on what and from what the numbers come."""
    machine, rows = comparison.provenance, comparison.rows
    return [
        f"Written {comparison.created} on {machine.get('processor', 'unknown')} "
        f"({machine.get('cores', '?')} cores, {machine.get('threads', '?')} threads, "
        f"{machine.get('device', '?')}), torch {machine.get('versions', {}).get('torch', '?')}"
        f"{_setup(comparison)}; {comparison.seconds:.0f} s of work, the search for rates "
        "included.",
        f"Base {comparison.base.path} ({comparison.base.parameters:,} parameters). "
        f"{rows.train:,} training rows, {rows.dev:,} rows to choose the rate by, {rows.test:,} "
        f"final rows with {rows.prompts:,} prompts{_answered(comparison)}, "
        f"{rows.heldout:,} held-out texts.",
    ]


def _setup(comparison: Comparison) -> str:
    """What the base was loaded in, and how many rows a step takes, where it is recorded."""
    dtype = str(comparison.provenance.get("dtype", "")).removeprefix("torch.")
    rows = comparison.recipe.get("trainer", {}).get("batch_size")
    return "".join([f", {dtype}" if dtype else "", f", batches of {rows} rows" if rows else ""])


def _answered(comparison: Comparison) -> str:
    """How many prompts were answered, where ``evaluate.generate_limit`` left some out."""
    exact = [
        v.estimates["exact_match"] for v in comparison.variants if "exact_match" in v.estimates
    ]
    answered = max((estimate.units for estimate in exact), default=comparison.rows.prompts)
    return f" ({answered:,} of them answered)" if answered < comparison.rows.prompts else ""


def markdown_head(comparison: Comparison) -> list[str]:
    """Facts and findings as paragraphs of Markdown."""
    paragraphs = [markdown_text(fact) for fact in _facts(comparison)]
    findings = (f"- {markdown_text(line)}" for line in verdict(comparison).findings)
    return [*paragraphs, "\n".join(findings)]


def markdown(comparison: Comparison) -> str:
    """The whole comparison as a Markdown page."""
    tables = [contender_table(comparison), quality_table(comparison), cost_table(comparison)]
    tables += [difference_table(comparison), search_table(comparison)]
    parts = [f"# Comparison {markdown_text(comparison.name)}"]
    parts += markdown_head(comparison)
    parts += [table.to_markdown() for table in tables if table.rows]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def contender_table(comparison: Comparison) -> Table:
    """What each contender changes of the recipe, and which are one training."""
    rows: list[tuple[Cell, ...]] = [
        (one.label, one.variant, _overrides(one), "") for one in comparison.variants
    ]
    rows += [
        (twin.label, "", "", f"not trained: the same training as {twin.of}")
        for twin in comparison.twins
        if not twin.trained
    ]
    is_told = any(row[2] or row[3] for row in rows)
    return Table("contenders", ("", "variant", "changes", ""), tuple(rows) if is_told else ())


def _overrides(variant: VariantResult) -> str:
    return ", ".join(f"{key}={value}" for key, value in variant.overrides.items())


def csv(comparison: Comparison) -> str:
    """Quality and costs, for a spreadsheet."""
    return "\n".join(t.to_csv() for t in (quality_table(comparison), cost_table(comparison)))


def screen(comparison: Comparison) -> list[Table]:
    """The tables for a terminal."""
    tables = [contender_table(comparison), search_table(comparison), cost_table(comparison)]
    pairs = difference_table(comparison, (*_IN_A_TERMINAL, *comparison.text_metrics))
    return [table for table in (*tables, quality_table(comparison), pairs) if table.rows]
