"""The report of a comparison: which variant to choose, how sure that is, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from loratune.compare.result import Comparison, VariantResult
from loratune.compare.tables import (
    contender_table,
    cost_table,
    difference_table,
    quality_table,
    search_table,
)
from loratune.compare.verdict import Choice, verdict
from loratune.config.secrets import redact
from loratune.report.comparison_charts import (
    curve_charts,
    difference_charts,
    pareto_charts,
    search_charts,
)
from loratune.report.page import Folded, Page, Section
from loratune.tables import facts
from loratune.units import duration

_PAIRED = (
    "Variants are compared on the same prompts and seeds, pair by pair. So two variants whose own "
    "intervals overlap can still differ surely: the interval of the difference decides, not theirs."
)


def comparison_page(comparison: Comparison, footer: str) -> Page:
    """The page of a comparison."""
    judged = verdict(comparison)
    searched = search_table(comparison)
    pairs = difference_table(comparison)
    contenders = tuple(table for table in (contender_table(comparison),) if table.rows)
    return Page(
        kicker=f"loratune comparison · {comparison.name} · {comparison.created}",
        title=f"{_labels(comparison.variants)} on {comparison.base.path}",
        verdict=judged.sentences,
        warnings=judged.cautions,
        cards=_cards(comparison, judged.choice),
        sections=(
            Section("quality", "Quality", tables=(quality_table(comparison),)),
            Section("contenders", "Contenders", tables=contenders),
            Section("cost", "Cost", tables=(cost_table(comparison),)),
            Section("pareto", "Quality against cost", charts=pareto_charts(comparison)),
            Section(
                "differences",
                "How sure the differences are",
                text=(_PAIRED,) if comparison.differences else (),
                charts=difference_charts(comparison, judged.choice),
                folded=(Folded("Every difference", (pairs,)),) if pairs.rows else (),
            ),
            Section("curves", "Loss curves", charts=curve_charts(comparison)),
            Section(
                "search",
                "Learning rates",
                charts=search_charts(comparison),
                folded=(Folded("All trials", (searched,), long=True),) if searched.rows else (),
            ),
            Section("samples", "Answers", samples=_samples(comparison)),
            _settings(comparison),
            _provenance(comparison),
        ),
        footer=footer,
    )


def _cards(comparison: Comparison, choice: Choice | None) -> tuple[tuple[str, str], ...]:
    rows = comparison.rows
    equal = _labels([*choice.as_good, *choice.undecided]) if choice else ""
    return (
        ("to choose", choice.chosen.label if choice else "none"),
        ("lowest loss", choice.best.label if choice else "none"),
        ("as good, or undecided", equal or "none"),
        ("seeds a variant", str(len(comparison.seeds))),
        (f"test rows, {rows.prompts:,} prompts", f"{rows.test:,}"),
        ("steps each", f"{comparison.steps:,}"),
        ("spent in all trainings", duration(comparison.seconds)),
    )


def _labels(variants: Sequence[VariantResult]) -> str:
    return ", ".join(variant.label for variant in variants)


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
    return Section(
        "settings",
        "Settings",
        tables=(facts(pairs),),
        folded=(
            Folded("Adapters, with the chosen rates", code=_yaml(adapters)),
            Folded("Recipe, as resolved", code=_yaml(comparison.recipe)),
        ),
    )


def _yaml(value: dict[str, Any]) -> str:
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
    return Section("provenance", "Provenance", tables=(facts(pairs),))


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
