"""A plan for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from loratune.console import console, printable, say
from loratune.plan.memory import ERROR_BAR
from loratune.plan.sources import COMMAND_LINE, DEFAULT

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


def size(number: float) -> str:
    """Bytes with a decimal unit and three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def show_plan(plan: Plan) -> None:
    """Print it."""
    console().print(_values(plan))
    for line in _work(plan):
        say(line)
    console().print(_memory(plan))
    for line in _rest(plan):
        say(line)


def _values(plan: Plan) -> Table:
    table = Table(title=Text(f"recipe {plan.name}"), title_justify="left")
    for name in ("setting", "value", "set by"):
        table.add_column(name, overflow="fold")
    hidden = 0
    for item in plan.values:
        if item.source == DEFAULT or item.key.startswith("model.architecture"):
            hidden += 1
            continue
        style = "bold" if item.source == COMMAND_LINE else ""
        table.add_row(item.key, Text(printable(str(item.value)), style), Text(item.source))
    table.caption = f"{hidden} more are defaults or the model's numbers (--cfg job shows all)"
    table.caption_justify = "left"
    return table


def _work(plan: Plan) -> Iterator[str]:
    work = plan.work
    if work.report is not None:
        yield from work.report.lines()
    passes = "" if work.epochs is None else f" = {work.epochs:.2f} passes"
    if not work.steps:
        yield "steps: not known without the rows (trainer.epochs)"
    yield (
        f"{work.steps:,} steps{passes}, {work.tokens:,} tokens with padding, "
        f"{work.supervised:,} learnt"
    )
    yield (
        f"largest micro-batch: {work.largest.sequences} × {work.largest.length} tokens; "
        f"{str(plan.setting.dtype).removeprefix('torch.')} on {plan.setting.device}"
    )


def _memory(plan: Plan) -> Table:
    table = Table(title=f"peak memory (± {ERROR_BAR:.0%})", title_justify="left")
    table.add_column("component")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    for name, number in plan.memory.components().items():
        if number:
            table.add_row(_LABELS[name], size(number), f"{number / plan.memory.peak:.0%}")
    table.add_section()
    table.add_row("peak", size(plan.memory.peak), "")
    return table


def _rest(plan: Plan) -> Iterator[str]:
    disk = plan.disk
    merged = f", merged model {size(disk.merged)}" if disk.merged else ""
    yield (
        f"disk: checkpoints {size(disk.checkpoints)}, adapter {size(disk.adapter)}{merged}; "
        f"{size(disk.free)} free"
    )
    if plan.time is not None:
        yield (
            f"time: about {duration(plan.time.training)} of training "
            f"({plan.time.tokens_per_second:,.0f} tokens/s, from one block on "
            f"{plan.time.calibrated_on} tokens) and {duration(plan.time.evaluation)} of "
            "evaluation, generation not counted"
        )
    for warning in plan.warnings:
        yield warning if warning.startswith(("warning", "error")) else f"warning: {warning}"
    if plan.budget is not None:
        words = " ".join(plan.overrides)
        said = (
            f"fits into {size(plan.budget)} with: {words}"
            if words
            else (f"fits into {size(plan.budget)} as it is")
        )
        yield said
