"""A plan for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loratune.console import say
from loratune.plan.memory import ERROR_BAR
from loratune.plan.sources import COMMAND_LINE, DEFAULT
from loratune.tables import Table, show
from loratune.units import byte_size, duration

if TYPE_CHECKING:
    from loratune.plan.plan import Plan

_LABELS = {
    "process": "process (python, torch)",
    "weights": "base weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "working": "loss head or backward",
}


def show_plan(plan: Plan) -> None:
    """Print it."""
    show(_values(plan))
    for line in _work(plan):
        say(line)
    show(_memory(plan))
    for line in _rest(plan):
        say(line)


def _values(plan: Plan) -> Table:
    listed = [
        item
        for item in plan.values
        if item.source != DEFAULT and not item.key.startswith("model.architecture")
    ]
    hidden = len(plan.values) - len(listed)
    return Table(
        f"recipe {plan.name}",
        ("setting", "value", "set by"),
        tuple((item.key, str(item.value), item.source) for item in listed),
        numeric=(False, False, False),
        caption=f"{hidden} more are defaults or the model's numbers (--cfg job shows all)",
        marked=frozenset(n for n, item in enumerate(listed) if item.source == COMMAND_LINE),
    )


def _work(plan: Plan) -> Iterator[str]:
    work = plan.work
    if work.report is not None:
        yield from work.report.lines()
    passes = "" if work.epochs is None else f" = {work.epochs:.2f} passes"
    if not work.steps:
        yield "steps: not known without the rows (trainer.epochs)"
    yield (
        f"{work.steps:,} steps{passes}, {work.tokens:,} tokens with padding, "
        f"{work.supervised:,} supervised"
    )
    yield (
        f"largest micro-batch: {work.largest.sequences} × {work.largest.length} tokens; "
        f"{str(plan.setting.dtype).removeprefix('torch.')} on {plan.setting.device}"
    )


def _memory(plan: Plan) -> Table:
    parts = [(name, number) for name, number in plan.memory.components().items() if number]
    rows = [(_LABELS[name], number, f"{number / plan.memory.peak:.0%}") for name, number in parts]
    return Table(
        f"peak memory (± {ERROR_BAR:.0%})",
        ("component", "bytes", "share"),
        (*rows, ("peak", plan.memory.peak, "")),
        formats={"bytes": byte_size},
        marked=frozenset({len(rows)}),
    )


def _rest(plan: Plan) -> Iterator[str]:
    disk = plan.disk
    merged = f", merged model {byte_size(disk.merged)}" if disk.merged else ""
    yield (
        f"disk: checkpoints {byte_size(disk.checkpoints)}, "
        f"adapter {byte_size(disk.adapter)}{merged}; {byte_size(disk.free)} free"
    )
    if plan.time is not None:
        yield (
            f"time: about {duration(plan.time.training, 2)} of training "
            f"({plan.time.tokens_per_second:,.0f} tokens/s, from one block on "
            f"{plan.time.calibrated_on} tokens) and {duration(plan.time.evaluation, 2)} of "
            "evaluation, generation not counted"
        )
    for warning in plan.warnings:
        yield warning if warning.startswith(("warning", "error")) else f"warning: {warning}"
    if plan.budget is not None:
        how = f"with: {' '.join(plan.overrides)}" if plan.overrides else "as it is"
        yield f"fits into {byte_size(plan.budget)} {how}"
