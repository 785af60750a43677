"""Problems of a training, and what to do about them: each rule reads the records alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from statistics import median_high
from typing import Any

from loratune.adapters.registry import config_class, variant_names
from loratune.training.history import History, mean
from loratune.units import filled

RISEN = 1.02
"""Evaluation loss over its best from which a rise counts."""
JUMP = 3.0
"""Training loss over the median of the ten steps before from which it is a jump."""
TOO_FAR = 3.0
"""‖Δθ‖/‖θ‖ of the first step above which it threw away what the adapter began with."""
BARELY = 0.03
"""Share by which a loss must fall to count as learning."""
LOW_FILL = 0.7
"""Share of computed tokens that are not padding below which batches are wasteful."""
OFTEN_CLIPPED = 0.9
"""Share of clipped steps from which the norm is set too low."""
FEW_STEPS = 20
"""Trainings shorter than this say nothing about rates."""


@dataclass(frozen=True)
class Setup:
    """The settings that advice depends on."""

    on_jumps: str = ""
    """The variant's own advice where the loss jumps, beside a lower learning rate."""
    clip_norm: float = 0.0
    packing: bool = False
    group_by_length: bool = True

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> Setup:
        """From a resolved recipe as plain values."""
        adapter, trainer, data = (recipe.get(key) or {} for key in ("adapter", "trainer", "data"))
        return cls(
            on_jumps=_advice_on_jumps(adapter),
            clip_norm=float(trainer.get("clip_norm") or 0.0),
            packing=bool(data.get("packing")),
            group_by_length=bool(data.get("group_by_length", True)),
        )


def _advice_on_jumps(adapter: Mapping[str, Any]) -> str:
    if adapter.get("variant") not in variant_names():
        return ""
    variant = config_class(adapter["variant"])
    settings = {f.name: adapter[f.name] for f in fields(variant) if f.name in adapter}
    return variant(**settings).advice_on_jumps()


@dataclass(frozen=True)
class Advice:
    """One problem, with what to do about it.

    Attributes:
        kind: ``eval_rising``, ``rate_too_high``, ``ratio_too_high``, ``rate_too_low``,
            ``still_falling``, ``dead_modules``, ``low_fill`` or ``often_clipped``.
        text: a sentence or two for people.
    """

    kind: str
    text: str


def advise(history: History, setup: Setup) -> list[Advice]:
    """Every problem, the most serious first."""
    too_high = _rate_too_high(history, setup)
    advice = [
        too_high,
        _dead_modules(history),
        _eval_rising(history),
        None if too_high else _rate_too_low(history),
        _still_falling(history),
        None if too_high else _often_clipped(history, setup),
        _low_fill(history, setup),
    ]
    return [one for one in advice if one is not None]


def _dead_modules(history: History) -> Advice | None:
    count = history.last("health/dead_modules")
    if not count:
        return None
    named = [row["health/dead_names"] for row in history.timings if row.get("health/dead_names")]
    names = f" ({', '.join(map(str, named[-1]))})" if named else ""
    return Advice(
        "dead_modules",
        f"{int(count)} adapted modules no longer get a gradient{names}: they do not reach the "
        "loss. Leave them out with targets.exclude, or look for what freezes or skips them.",
    )


def _eval_rising(history: History) -> Advice | None:
    losses = history.pairs("eval/loss")
    if len(losses) < 3:
        return None
    best_step, best = min(losses, key=lambda pair: pair[1])
    last_step, last = losses[-1]
    since = [pair for pair in losses if pair[0] > best_step]
    if len(since) < 2 or last <= best * RISEN:
        return None
    before = [loss for step, loss in history.pairs("train/loss") if step <= best_step]
    after = [loss for step, loss in history.pairs("train/loss") if step > best_step]
    memorises = before and after and mean(after[-10:]) < mean(before[-10:])
    why = " while training loss fell: the adapter memorises" if memorises else ""
    return Advice(
        "eval_rising",
        f"Evaluation loss rose from {best:.4g} at step {best_step} to {last:.4g} at step "
        f"{last_step}{why}. The adapter of step {best_step} is the one kept. Train fewer steps "
        "(trainer.early_stop_patience stops by itself), use more rows, or adapter.dropout=0.1.",
    )


def _rate_too_high(history: History, setup: Setup) -> Advice | None:
    what = _leap(history) or _jumps(history)
    if what is None:
        return None
    if setup.on_jumps:
        return Advice("ratio_too_high", f"{what}. {setup.on_jumps}")
    return Advice(
        "rate_too_high",
        f"{what}: the learning rate is too high. Divide it by three to ten (trainer.lr_scale), or "
        "search it with loratune tune.",
    )


def _leap(history: History) -> str | None:
    first = next(iter(history.values("health/update_ratio")), 0.0)
    if first <= TOO_FAR:
        return None
    return f"The first measured step moved the adapter by {first:.2g} times its own size"


def _jumps(history: History) -> str | None:
    losses = history.values("train/loss")
    if len(losses) < FEW_STEPS:
        return None
    floor = 0.25 * median_high(losses[:5])
    jumps = [
        number
        for number in range(10, len(losses))
        if losses[number] > max(JUMP * median_high(losses[number - 10 : number]), floor)
    ]
    tenth = max(len(losses) // 10, 3)
    ended, started = mean(losses[-tenth:]), mean(losses[:3])
    if len(jumps) < 2 and ended <= started * 1.2:
        return None
    if ended > started * 1.2:
        return f"Training loss ended above its start ({started:.4g} to {ended:.4g})"
    return f"Training loss jumped {len(jumps)} times, first at record {jumps[0] + 1}"


def _rate_too_low(history: History) -> Advice | None:
    losses = history.values("train/loss")
    if len(losses) < FEW_STEPS:
        return None
    tenth = max(len(losses) // 10, 3)
    started, ended = mean(losses[:tenth]), mean(losses[-tenth:])
    if started <= 0 or ended < started * (1 - BARELY):
        return None
    return Advice(
        "rate_too_low",
        f"Training loss hardly moved ({started:.4g} to {ended:.4g} in {len(losses)} records). "
        "Either the base knows the task already, or the learning rate is too low: multiply it by "
        "three to ten (trainer.lr_scale), or search it with loratune tune.",
    )


def _still_falling(history: History) -> Advice | None:
    losses = history.pairs("eval/loss")
    if len(losses) < 3:
        return None
    (_, before), (step, last) = losses[-2:]
    if last > before * 0.95 or before - last < 0.01 or last > min(loss for _, loss in losses):
        return None
    return Advice(
        "still_falling",
        f"Evaluation loss was still falling at the end ({before:.4g} to {last:.4g} at step "
        f"{step}): more trainer.steps are likely to help.",
    )


def _often_clipped(history: History, setup: Setup) -> Advice | None:
    norms = history.values("train/grad_norm")
    if not setup.clip_norm or len(norms) < FEW_STEPS:
        return None
    share = sum(norm > setup.clip_norm for norm in norms) / len(norms)
    if share < OFTEN_CLIPPED:
        return None
    return Advice(
        "often_clipped",
        f"Gradients were clipped at {share:.0%} of the steps "
        f"(median norm {median_high(norms):.3g}, "
        f"trainer.clip_norm={setup.clip_norm:g}): the clip, not the gradient, sets the step. Raise "
        "trainer.clip_norm, or use larger batches.",
    )


def _low_fill(history: History, setup: Setup) -> Advice | None:
    fills = history.values("train/fill_rate")
    if len(fills) < 5 or mean(fills) >= LOW_FILL:
        return None
    fix = "data.packing=true" if setup.group_by_length else "data.group_by_length=true"
    if setup.packing:
        fix = "a data.max_length nearer to a multiple of the rows' lengths"
    return Advice(
        "low_fill",
        f"{1 - mean(fills):.0%} of the computed tokens were padding; {fix} wastes less.",
    )


def summary_lines(history: History, setup: Setup) -> list[str]:
    """The training in one line, then one line per piece of advice."""
    losses, evals = history.values("train/loss"), history.pairs("eval/loss")
    if not losses:
        return []
    parts = [f"loss {losses[0]:.4g} → {losses[-1]:.4g}"]
    if evals:
        step, best = min(evals, key=lambda pair: pair[1])
        parts.append(f"best evaluation loss {best:.4g} at step {step}")
    seconds, rates = history.values("train/step_seconds"), history.values("train/tokens_per_second")
    fills, ratio = history.values("train/fill_rate"), history.last("health/norm_ratio")
    if seconds:
        parts.append(f"{median_high(seconds):.3g} s a step")
    if rates:
        parts.append(f"{median_high(rates):,.0f} tokens/s")
    if fills:
        parts.append(filled(mean(fills)))
    if ratio is not None:
        parts.append(f"‖B‖/‖A‖ {ratio:.2g}")
    advice = [f"advice: {one.text}" for one in advise(history, setup)]
    return ["health: " + ", ".join(parts), *advice]
