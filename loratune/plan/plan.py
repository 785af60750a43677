"""The answer to ``loratune plan``, as values and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from loratune.console import say
from loratune.data.arrangement import sharing_line
from loratune.data.mixture import seen_line
from loratune.plan.memory import ERROR_BAR, Memory
from loratune.plan.setting import Setting
from loratune.plan.sources import COMMAND_LINE, DEFAULT, SourcedValue
from loratune.plan.workload import Workload
from loratune.tables import Table, show
from loratune.units import byte_size, duration

_LABELS = {
    "process": "process (python, torch)",
    "weights": "base weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "working": "loss head or backward",
}


@dataclass(frozen=True)
class Disk:
    """Bytes that a run leaves behind.

    Attributes:
        checkpoints: those kept at the same time.
        adapter: the published adapter.
        merged: the merged model, if the recipe merges.
        free: what the file system has, as far as anybody says.
    """

    checkpoints: int
    adapter: int
    merged: int
    free: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.checkpoints + self.adapter + self.merged


@dataclass(frozen=True)
class Time:
    """Expected seconds on this machine, and the trial that they come from.

    Attributes:
        training: of all steps, compiling included.
        evaluation: of all evaluations.
        tokens_per_second: while training.
        calibrated_on: tokens of the trial.
        doubt: about how the time is spent.
    """

    training: float
    evaluation: float
    tokens_per_second: float
    calibrated_on: int
    doubt: str | None = None


@dataclass(frozen=True)
class Plan:
    """The answer to ``loratune plan``."""

    name: str
    values: tuple[SourcedValue, ...]
    setting: Setting
    work: Workload
    memory: Memory
    disk: Disk
    time: Time | None
    warnings: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    budget: int | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "name": self.name,
            "values": {v.key: {"value": v.value, "source": v.source} for v in self.values},
            "device": str(self.setting.device),
            "dtype": str(self.setting.dtype).removeprefix("torch."),
            "steps": self.work.steps,
            "epochs": self.work.epochs,
            "tokens": self.work.tokens,
            "supervised_tokens": self.work.supervised,
            "times_seen": dict(self.work.times_seen),
            "largest_micro_batch": asdict(self.work.largest),
            "data": self.work.report.to_dict() if self.work.report else None,
            "memory": {
                **self.memory.components(), "peak": self.memory.peak, "error_bar": ERROR_BAR,
            },
            "disk": {**asdict(self.disk), "total": self.disk.total},
            "time": asdict(self.time) if self.time else None,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "fit": {"budget": self.budget, "overrides": list(self.overrides)}
            if self.budget is not None
            else None,
        }  # fmt: skip


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
    unit = "epochs" if work.times_seen else "passes"
    passes = "" if work.epochs is None else f" = {work.epochs:.2f} {unit}"
    if not work.steps:
        yield "steps: not known without the rows (trainer.epochs)"
    yield (
        f"{work.steps:,} steps{passes}, {work.tokens:,} tokens computed, "
        f"{work.supervised:,} supervised"
    )
    if work.times_seen:
        yield seen_line(work.times_seen)
    if work.row_tokens > work.tokens:
        yield sharing_line(work.row_tokens, work.tokens)
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
    for note in plan.notes:
        yield f"note: {note}"
    for warning in plan.warnings:
        yield warning if warning.startswith(("warning", "error")) else f"warning: {warning}"
    if plan.budget is not None:
        how = f"with: {' '.join(plan.overrides)}" if plan.overrides else "as it is"
        yield f"fits into {byte_size(plan.budget)} {how}"
