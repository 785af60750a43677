"""The report of a comparison: which variant to choose, how sure that is, and why."""

from __future__ import annotations

from typing import Any

from loratune.compare.result import Comparison, VariantResult
from loratune.config.secrets import redact
from loratune.report.comparison_charts import (
    curve_charts,
    difference_charts,
    pareto_charts,
    scores,
    search_chart,
)
from loratune.report.comparison_verdict import Verdict, difference, verdict
from loratune.report.numbers import byte_size, duration, percent, significant
from loratune.report.page import Folded, Page, Section, Table, facts_table

_PAIRED = (
    "Variants are compared on the same prompts and seeds, pair by pair. So two variants whose own "
    "intervals overlap can still differ surely: the interval of the difference decides, not theirs."
)


def comparison_page(comparison: Comparison, footer: str) -> Page:
    """The page of a comparison."""
    judged = verdict(comparison)
    names = ", ".join(variant.label for variant in comparison.variants)
    search = search_chart(comparison)
    return Page(
        kicker=f"loratune comparison · {comparison.name} · {comparison.created}",
        title=f"{names} on {comparison.base.path}",
        verdict=judged.sentences,
        advice=judged.cautions,
        cards=_cards(comparison, judged),
        sections=(
            Section("quality", "Quality", tables=(_quality_table(comparison, judged),)),
            Section("cost", "Cost", tables=(_cost_table(comparison, judged),)),
            Section("pareto", "Quality against cost", charts=pareto_charts(comparison)),
            Section(
                "differences",
                "How sure the differences are",
                text=(_PAIRED,) if comparison.differences else (),
                findings=tuple(comparison.findings),
                charts=difference_charts(comparison),
                folded=_difference_details(comparison),
            ),
            Section("curves", "Loss curves", charts=curve_charts(comparison)),
            Section(
                "search",
                "Learning rates",
                charts=(search,) if search else (),
                folded=_search_details(comparison),
            ),
            Section("samples", "Answers", samples=_samples(comparison)),
            _settings(comparison),
            _provenance(comparison),
        ),
        footer=footer,
    )


def _cards(comparison: Comparison, judged: Verdict) -> tuple[tuple[str, str], ...]:
    rows = comparison.rows
    return (
        ("to choose", judged.choice or "none"),
        ("lowest loss", judged.best or "none"),
        ("not told from the lowest", ", ".join(judged.tied) or "none"),
        ("seeds a variant", str(len(comparison.seeds))),
        (f"test rows, {rows.prompts:,} prompts", f"{rows.test:,}"),
        ("steps each", f"{comparison.steps:,}"),
        ("spent in all trainings", duration(comparison.seconds)),
    )


def _marked(comparison: Comparison, judged: Verdict) -> frozenset[int]:
    labels = [variant.label for variant in comparison.variants]
    return frozenset({labels.index(judged.choice)} if judged.choice in labels else ())


def _quality_table(comparison: Comparison, judged: Verdict) -> Table:
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
    return f"worse\n{p}" if test.significant else f"no significant difference\n{p}"


def _cost_table(comparison: Comparison, judged: Verdict) -> Table:
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


def _difference_details(comparison: Comparison) -> tuple[Folded, ...]:
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


def _search_details(comparison: Comparison) -> tuple[Folded, ...]:
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


def _samples(comparison: Comparison) -> tuple[tuple[tuple[str, str], ...], ...]:
    return tuple(
        (
            ("prompt", sample.prompt.strip()),
            ("reference", sample.reference.strip()),
            ("base", sample.base.strip()),
            *((label, answer.strip()) for label, answer in sample.answers.items()),
        )
        for sample in comparison.samples
    )


def _settings(comparison: Comparison) -> Section:
    import yaml

    rows = comparison.rows
    pairs = [
        ("matched by", comparison.match),
        ("steps of every final training", f"{comparison.steps:,}"),
        ("seeds", ", ".join(map(str, comparison.seeds))),
        ("rows trained on", f"{rows.train:,}"),
        ("rows of search and curves (dev)", f"{rows.dev:,}"),
        ("rows of the final numbers (test)", f"{rows.test:,} with {rows.prompts:,} prompts"),
        ("held-out texts for forgetting", f"{rows.heldout:,}"),
    ]
    pairs += [(f"source of {part}", path) for part, path in rows.sources.items()]
    adapters = {variant.label: variant.adapter for variant in comparison.variants}
    notes = tuple(f"{v.label}: {note}" for v in comparison.variants for note in v.notes)
    return Section(
        "settings",
        "Settings",
        findings=notes,
        tables=(facts_table(pairs),),
        folded=(
            Folded("Adapters, with the chosen rates", code=_yaml(yaml, adapters)),
            Folded("Recipe, as resolved", code=_yaml(yaml, comparison.recipe)),
        ),
    )


def _yaml(yaml: Any, value: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(redact(value), sort_keys=False, allow_unicode=True)
    return text


def _provenance(comparison: Comparison) -> Section:
    base = comparison.base
    pairs = [
        ("base", f"{base.path}, {base.parameters:,} parameters"),
        ("fingerprint of base", base.fingerprint),
        *((f"fingerprint of {k} rows", v) for k, v in comparison.rows.fingerprints.items()),
        *_flat(redact(comparison.provenance)),
    ]
    return Section("provenance", "Provenance", tables=(facts_table(pairs),))


def _flat(values: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    for key, value in values.items():
        if isinstance(value, dict):
            text = ", ".join(f"{name} {item}" for name, item in value.items())
        elif isinstance(value, list):
            text = " ".join(map(str, value))
        else:
            text = str(value)
        pairs.append((str(key), text))
    return pairs
