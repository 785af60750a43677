"""Parameter counts that papers and documentation print, recomputed by the formulas used here.

``assets/published_counts.json`` holds what was printed where, and for which recipe.  The exact
numbers and the verdicts are not in it: they follow from the shapes, through the same code that
counts a user's model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any

from loratune.adapters.config import LayerKind, LayerShape
from loratune.adapters.registry import config_class
from loratune.config.schema import TargetsConfig
from loratune.counting.parameters import FP32_BYTES, VariantCount, count_variant
from loratune.counting.rounding import Verdict, in_unit, judge
from loratune.files import ASSETS, read_json
from loratune.models.architectures import architecture_from_numbers
from loratune.targets.find import find_targets

PUBLISHED_COUNTS = ASSETS / "published_counts.json"


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One printed number beside the exact one.

    Attributes:
        source: where it is printed.
        recipe: model, variant, targets and rank as the source states them.
        quantity: trainable, frozen, stored, total, base, bytes, trainable_bytes,
            percent_of_base or percent_of_total.
        exact: the exact number (percent: unrounded); ``None`` where nothing reproduces it.
        shown: ``exact`` in the printed unit.
        meant: the recipe that does give a wrong number, where there is one.
        trains_here: whether loratune can train this model.
    """

    id: str
    source: str
    model: str
    recipe: str
    quantity: str
    printed: str
    exact: int | float | None
    shown: str
    verdict: Verdict
    meant: str
    explanation: str
    trains_here: bool


@dataclass(frozen=True, slots=True)
class _Model:
    label: str
    layers: tuple[LayerShape, ...]
    base_parameters: int
    family: str | None
    trains_here: bool


def published_report() -> list[PublishedRow]:
    """Every published number, recomputed and judged."""
    content = read_json(PUBLISHED_COUNTS)
    models = {name: _model(entry) for name, entry in content["models"].items()}
    return [_report_row(row, models) for row in content["rows"]]


def _model(entry: Mapping[str, Any]) -> _Model:
    if "architecture" in entry:
        model = architecture_from_numbers(entry["architecture"])
        return _Model(entry["label"], model.layers, model.base_parameters, model.family, True)
    table = entry["table"]
    layers = tuple(
        LayerShape(f"{table['prefix']}.{block}.{name}", LayerKind.linear, shape[0], shape[1])
        for block in range(table["blocks"])
        for name, shape in table["block"].items()
    )
    return _Model(entry["label"], layers, table.get("base_parameters", 0), None, False)


def _report_row(row: Mapping[str, Any], models: Mapping[str, _Model]) -> PublishedRow:
    printed, unit = row["printed"], row.get("unit", "")
    if "search" in row:
        exact, verdict = _search(row, models[row["model"]])
    else:
        exact = _exact(row, models)
        verdict = judge(printed, unit, exact)
    number = None if exact is None else exact.numerator if exact.denominator == 1 else float(exact)
    return PublishedRow(
        id=row["id"],
        source=row["source"],
        model=models[row["model"]].label,
        recipe=_recipe(row, models),
        quantity=row["quantity"],
        printed=f"{printed}{' ' if len(unit) > 1 else ''}{unit}",
        exact=number,
        shown="" if exact is None else in_unit(printed, unit, exact),
        verdict=verdict,
        meant=_meant(row, models) if verdict is Verdict.wrong else "",
        explanation=row.get("explanation", ""),
        trains_here=models[row["model"]].trains_here,
    )


def _exact(row: Mapping[str, Any], models: Mapping[str, _Model]) -> Fraction:
    model = models[row["model"]]
    if row["quantity"] == "base":
        return Fraction(model.base_parameters)
    return _quantity(row, model, row["targets"], row.get("saved", {}))


def _quantity(
    row: Mapping[str, Any], model: _Model, targets: list[str], saved: Mapping[str, int]
) -> Fraction:
    match = find_targets(model.layers, TargetsConfig(modules=targets), family=model.family)
    config = config_class(row["variant"])(**_settings(row))
    size = row.get("bytes_per_number", FP32_BYTES)
    count = count_variant(model.base_parameters, match.shapes, config, saved, size)
    return _read(count, row["quantity"], model.base_parameters, size)


def _settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """The variant's settings as the source states them: mostly the rank alone."""
    rank = {"rank": row["rank"]} if "rank" in row else {}
    return {**rank, **row.get("settings", {})}


def _read(count: VariantCount, quantity: str, base: int, size: int) -> Fraction:
    """One quantity of a count; percentages are exact fractions."""
    match quantity:
        case "bytes":
            return Fraction(count.stored_bytes)
        case "trainable_bytes":
            return Fraction(count.trainable * size)
        case "percent_of_base":
            return Fraction(100 * count.trainable, base)
        case "percent_of_total":
            return Fraction(100 * count.trainable, count.total)
        case _:
            return Fraction(getattr(count, quantity))


def _search(row: Mapping[str, Any], model: _Model) -> tuple[Fraction | None, Verdict]:
    """The first recipe of a whole range whose trainable numbers are the printed ones, if any."""
    search = row["search"]
    names: list[str] = search["targets"]
    subsets = [list(s) for n in range(1, len(names) + 1) for s in combinations(names, n)]
    for targets in subsets:
        layers = find_targets(model.layers, TargetsConfig(modules=targets)).shapes
        for rank in search["ranks"]:
            added = config_class(row["variant"])(rank=rank).count([(x, rank) for x in layers])
            for extra in search["saved"]:
                exact = Fraction(added.trainable + extra)
                verdict = judge(row["printed"], row.get("unit", ""), exact)
                if verdict is not Verdict.wrong:
                    return exact, verdict
    return None, Verdict.not_reproducible


def _meant(row: Mapping[str, Any], models: Mapping[str, _Model]) -> str:
    """The recipe that a wrong number really belongs to, checked before it is named."""
    if "meant" not in row:
        return ""
    changed = {**row, **row["meant"]}
    verdict = judge(row["printed"], row.get("unit", ""), _exact(changed, models))
    if verdict is Verdict.wrong:
        return ""
    return f"{_recipe(changed, models)}: {changed['quantity']}"


def _recipe(row: Mapping[str, Any], models: Mapping[str, _Model]) -> str:
    label = models[row["model"]].label
    if "variant" not in row:
        return label
    if "search" in row:
        return f"{label} {row['variant']} (not stated)"
    saved = "".join(f" + {name}" for name in row.get("saved", {}))
    settings = "".join(f" {key.replace('_', ' ')} {value}" for key, value in _settings(row).items())
    return f"{label} {row['variant']} [{', '.join(row['targets'])}]{settings}{saved}"
