"""The scores of an evaluation, base and adapted side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loratune.scoring.registry import EXACT_MATCH, metric_label
from loratune.tables import Table
from loratune.units import percent, significant

_SCORES = (
    ("loss, nats per token", "loss", significant),
    ("perplexity", "perplexity", significant),
    ("token accuracy", "token_accuracy", percent),
    ("exact match", EXACT_MATCH, percent),
)
GAIN = "adapted − base [95 % CI]"


def score_table(evaluation: Mapping[str, Any], caption: str = "") -> Table:
    """What ``evaluation.json`` says, as a table."""
    sides = [(name, evaluation.get(name)) for name in ("base", "adapted")]
    measured = [(name, scores) for name, scores in sides if scores]
    gains: Mapping[str, Any] = evaluation.get("gains") or {}
    rows = [
        (label, key, [form(scores.get(key)) for _, scores in measured])
        for label, key, form in _SCORES
        if any(scores.get(key) is not None for _, scores in measured)
    ]
    others = dict.fromkeys(name for _, side in measured for name in side.get("scores") or {})
    rows += [
        (metric_label(name), name, [_value(side, name) for _, side in measured])
        for name in others
        if name not in {key for _, key, _ in _SCORES}
    ]
    sources = dict.fromkeys(n for _, side in measured for n in side.get("source_losses") or {})
    rows += [
        (f"loss on {name}", "", [_source_loss(side, name) for _, side in measured])
        for name in sources
    ]
    title = f"evaluation on {evaluation.get('rows', 0):,} rows"
    columns = ("", *(name for name, _ in measured))
    if not gains:
        return Table(title, columns, tuple((r, *cells) for r, _, cells in rows), caption=caption)
    cells = tuple((label, *values, gain_text(key, gains.get(key))) for label, key, values in rows)
    return Table(title, (*columns, GAIN), cells, caption=caption)


def retention_table(evaluation: Mapping[str, Any]) -> Table | None:
    """What was forgotten of other rows, or ``None`` where nobody asked."""
    kept: Mapping[str, Any] = evaluation.get("retention") or {}
    rows = [
        (name, _label(key), *(_value(one.get(side) or {}, key) for side in ("base", "adapted")),
         gain_text(key, gain))
        for name, one in kept.items()
        for key, gain in (one.get("gains") or {}).items()
    ]  # fmt: skip
    columns = ("rows", "", "base", "adapted", GAIN)
    caption = "A loss that rose, or a score that fell, is what was forgotten."
    return Table("retention", columns, tuple(rows), caption=caption) if rows else None


def task_table(scores: Sequence[Mapping[str, Any]]) -> Table:
    """What lm-eval measured, a line for each metric of each task."""
    rows = tuple(
        (one["task"], one["metric"], significant(one["base"]), significant(one["adapted"]),
         gain_text(one["metric"], one["gain"]))
        for one in scores
    )  # fmt: skip
    return Table("tasks of lm-eval", ("task", "metric", "base", "adapted", GAIN), rows)


def gain_text(key: str, gain: Mapping[str, Any] | None) -> str:
    """A difference with its interval; shares in points."""
    if gain is None:
        return ""
    form: Callable[[float], str] = (lambda x: f"{100 * x:+.1f}") if key == EXACT_MATCH else _signed
    unit = " points" if key == EXACT_MATCH else ""
    text = form(gain["difference"]) + unit
    if gain.get("low") is None:
        return text
    return f"{text} [{form(gain['low'])}, {form(gain['high'])}]"


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "") + significant(value, 3)


def _label(key: str) -> str:
    return "loss, nats per token" if key == "loss" else metric_label(key)


def _value(side: Mapping[str, Any], name: str) -> str:
    value = (side.get("scores") or {}).get(name, {}).get("value")
    return percent(value) if name == EXACT_MATCH else significant(value)


def _source_loss(side: Mapping[str, Any], name: str) -> str:
    return significant((side.get("source_losses") or {}).get(name))
