"""One plain training in memory: the loop of ``train`` without its folder and checkpoints."""

from __future__ import annotations

import hashlib
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from loratune.compare.result import CurvePoint
from loratune.config.schema import TrainerConfig
from loratune.errors import Interrupted, Preempted
from loratune.loss import LanguageModelHead
from loratune.stages.train import TrainingSet
from loratune.surgery import WrappedModel
from loratune.training import guards
from loratune.training.optim import make_optimizer, schedule_factor, set_learning_rate
from loratune.training.signals import StopRequest
from loratune.training.state import seed_everything
from loratune.training.step import train_step

UNTIMED_STEPS = 2
"""First steps left out of the median: they allocate and warm up."""


@dataclass
class Fit:
    """What a training left behind.

    Attributes:
        optimizer: in its last state.
        curve: losses along the way, from step 0.
        order: sha256 of the row numbers of every step.
        step_seconds: median time of a step, evaluations left out.
    """

    optimizer: torch.optim.Optimizer
    curve: list[CurvePoint] = field(default_factory=list)
    order: str = ""
    step_seconds: float = 0.0


def fit(
    wrapped: WrappedModel,
    head: LanguageModelHead,
    rows: TrainingSet,
    trainer: TrainerConfig,
    dev_loss: Callable[[], float] | None = None,
    points: int = 10,
) -> Fit:
    """Train the adapter for the plan's steps and leave the model in eval mode.

    Args:
        wrapped: a freshly wrapped model.
        head: its loss head.
        rows: rows and their order.
        trainer: settings, the seed among them.
        dev_loss: measured before the first step and at about ``points`` places after it.
        points: of the curve.

    Raises:
        TrainingError: divergence, or nothing that trains.
        Interrupted, Preempted: on SIGINT and SIGTERM, between two steps.
    """
    model, total = wrapped.model, rows.plan.total_steps
    guards.refuse_nothing_trainable(model)
    seed_everything(trainer.seed)
    optimizer = make_optimizer(model, wrapped.config, trainer)
    guards.refuse_zero_rate([group["peak_lr"] for group in optimizer.param_groups])
    every = max(1, total // points)
    clock, losses, tokens, order = _Clock(model), [], 0, hashlib.sha256()
    result = Fit(optimizer)
    result.curve.append(CurvePoint(
        step=0, tokens=0, seconds=0.0, train_loss=None, dev_loss=_measured(wrapped, dev_loss)
    ))  # fmt: skip
    model.train()
    with StopRequest() as stop:
        for step in range(total):
            numbers = rows.plan.micro_batches(step)
            order.update(repr(numbers).encode())
            with clock:
                set_learning_rate(optimizer, schedule_factor(step, total, trainer))
                batches = [rows.batch(part).to(clock.device) for part in numbers]
                metrics = train_step(head, batches, optimizer, trainer.clip_norm, step, rows.source)
            losses.append(metrics.loss)
            tokens += metrics.supervised
            if (step + 1) % every == 0 or step + 1 == total:
                result.curve.append(CurvePoint(
                    step=step + 1, tokens=tokens, seconds=clock.total,
                    train_loss=statistics.fmean(losses), dev_loss=_measured(wrapped, dev_loss),
                ))  # fmt: skip
                losses = []
                model.train()
            _stop_if_asked(stop)
    guards.refuse_non_finite(model, total)
    model.eval()
    result.order, result.step_seconds = order.hexdigest(), clock.median
    return result


def _measured(wrapped: WrappedModel, dev_loss: Callable[[], float] | None) -> float | None:
    if dev_loss is None:
        return None
    wrapped.model.eval()
    return dev_loss()


def _stop_if_asked(stop: StopRequest) -> None:
    fix = "give the same command again: what is finished is kept"
    if stop.received == signal.SIGINT:
        raise Interrupted("interrupted", fix=fix)
    if stop.received:
        raise Preempted("preempted", fix=fix)


class _Clock:
    """Times the blocks it is entered for, queued GPU work included."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.device = next(model.parameters()).device
        self.seconds: list[float] = []
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds.append(time.perf_counter() - self._started)

    @property
    def total(self) -> float:
        return sum(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds[UNTIMED_STEPS:] or self.seconds)
