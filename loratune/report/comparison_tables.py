"""The tables of a comparison: quality, cost, every difference, every trial."""

from __future__ import annotations

from loratune.compare.choice import difference
from loratune.compare.result import Comparison, VariantResult
from loratune.report.comparison_charts import scores
from loratune.report.comparison_verdict import Verdict
from loratune.report.numbers import byte_size, duration, percent, significant
from loratune.report.page import Folded, Table


def _marked(comparison: Comparison, judged: Verdict) -> frozenset[int]:
    labels = [variant.label for variant in comparison.variants]
    return frozenset({labels.index(judged.choice)} if judged.choice in labels else ())


def quality_table(comparison: Comparison, judged: Verdict) -> Table:
    """What every variant scored, and the base."""
    columns = (
        "variant", "learning rate", "loss, nats per token", "against the best", "exact match",
        "token accuracy", "forgetting, nats per token",
    )  # fmt: skip
    rows = [
        (
            variant.label,
            _rate(variant),
            scores(variant, "loss"),
            _against(comparison, judged, variant),
            scores(variant, "exact_match", share=True),
            scores(variant, "token_accuracy", share=True),
            scores(variant, "forgetting"),
        )
        for variant in comparison.variants
    ]
    base = comparison.base
    exact, accuracy = percent(base.exact_match), percent(base.token_accuracy)
    forgotten = "–" if base.heldout_loss is None else "0"
    rows.append(("base, unadapted", "", significant(base.loss), "", exact, accuracy, forgotten))
    return Table(
        columns,
        tuple(rows),
        caption="Means over seeds, below them 95 % intervals; the variant to choose is shaded.",
        marked=_marked(comparison, judged),
    )


def _rate(variant: VariantResult) -> str:
    if variant.lr is None:
        return "–"
    ratio = f"\n× {variant.lr_ratio:g} for B" if variant.lr_ratio is not None else ""
    return f"{variant.lr:.3g}{ratio}"


def _against(comparison: Comparison, judged: Verdict, variant: VariantResult) -> str:
    if variant.label == judged.best:
        return "lowest"
    if variant.reason or "loss" not in variant.estimates:
        return "failed"
    test = difference(comparison, str(judged.best), variant.label, "loss")
    if test is None:
        return "not tested"
    p = f"p = {significant(test.p_holm, 2)}"
    if not test.significant:
        return f"no significant difference\n{p}"
    return f"higher, yet as good\n{p}" if variant.label in judged.tied else f"worse\n{p}"


def cost_table(comparison: Comparison, judged: Verdict) -> Table:
    """What every variant trains, stores and keeps in memory, and how fast it is."""
    columns = (
        "variant", "rank", "trained", "% of base", "stored", "optimizer", "activations a token",
        "peak memory", "a step", "steps to target", "time to target", "merge residual",
    )  # fmt: skip
    rows = tuple(_costs(variant) for variant in comparison.variants)
    target = comparison.target_loss
    caption = "Activations a token: what autograd keeps because of the adapter. "
    caption += "" if target is None else f"Target: dev loss {significant(target)}. "
    base = _base_activations(comparison)
    caption += "" if base is None else f"The frozen base itself keeps {byte_size(base)} a token."
    return Table(columns, rows, caption=caption.strip(), marked=_marked(comparison, judged))


def _base_activations(comparison: Comparison) -> float | None:
    found = (variant.costs.base_activation_bytes_per_token for variant in comparison.variants)
    return next((value for value in found if value is not None), None)


def _costs(variant: VariantResult) -> tuple[str, ...]:
    costs = variant.costs

    def measured(metric: str) -> float | None:
        estimate = variant.estimates.get(metric)
        return None if estimate is None else estimate.mean

    return (
        variant.label,
        str(costs.rank),
        f"{costs.trainable:,}",
        f"{significant(costs.percent_of_base, 3)} %",
        byte_size(costs.stored_bytes),
        byte_size(costs.optimizer_bytes),
        byte_size(costs.activation_bytes_per_token),
        byte_size(measured("peak_bytes")),
        duration(measured("step_seconds")),
        significant(measured("steps_to_target"), 3),
        duration(measured("seconds_to_target")),
        significant(measured("merge_residual"), 3),
    )


def difference_details(comparison: Comparison) -> tuple[Folded, ...]:
    """Every pair in every metric."""
    rows = tuple(
        (
            d.metric.replace("_", " "),
            f"{d.first} − {d.second}",
            significant(d.difference),
            f"{significant(d.low)} to {significant(d.high)}",
            significant(d.p, 2),
            significant(d.p_holm, 2),
            d.words,
        )
        for d in comparison.differences
    )
    if not rows:
        return ()
    columns = ("metric", "pair", "difference", "95 % interval", "p", "p, Holm", "in words")
    numeric = (False, False, True, True, True, True, False)
    return (Folded("Every difference", (Table(columns, rows, numeric),)),)


def search_details(comparison: Comparison) -> tuple[Folded, ...]:
    """Every trial of the search for rates."""
    rows = tuple(
        (
            variant.label,
            f"{trial.lr:.3g}",
            "" if trial.lr_ratio is None else f"{trial.lr_ratio:g}",
            str(trial.steps),
            significant(trial.loss),
            trial.reason or ("chosen" if trial.lr == variant.lr else ""),
        )
        for variant in comparison.variants
        for trial in variant.search
    )
    if not rows:
        return ()
    columns = ("variant", "learning rate", "ratio", "steps", "dev loss", "")
    numeric = (False, True, True, True, True, False)
    return (Folded(f"All {len(rows)} trials", (Table(columns, rows, numeric),), long=True),)
