"""The answer to ``loratune plan``, as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from loratune.plan.memory import ERROR_BAR, Memory
from loratune.plan.setting import Setting
from loratune.plan.sources import SourcedValue
from loratune.plan.workload import Workload


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
    """Expected seconds on this machine, and the trial that they come from."""

    training: float
    evaluation: float
    tokens_per_second: float
    calibrated_on: int


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
            "largest_micro_batch": asdict(self.work.largest),
            "data": self.work.report.to_dict() if self.work.report else None,
            "memory": {
                **self.memory.components(), "peak": self.memory.peak, "error_bar": ERROR_BAR,
            },
            "disk": {**asdict(self.disk), "total": self.disk.total},
            "time": asdict(self.time) if self.time else None,
            "warnings": list(self.warnings),
            "fit": {"budget": self.budget, "overrides": list(self.overrides)}
            if self.budget is not None
            else None,
        }  # fmt: skip
