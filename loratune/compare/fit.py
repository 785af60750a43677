"""One training in memory, timed, with its curve: no folder, no checkpoints."""

from __future__ import annotations

import hashlib
import signal
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from loratune.compare.result import CurvePoint
from loratune.config.schema import TrainerConfig
from loratune.data.batches import BatchPlan
from loratune.data.training_set import TrainingSet
from loratune.errors import Interrupted, Preempted
from loratune.loss.causal_model import LanguageModelHead
from loratune.surgery import WrappedModel
from loratune.training import guards
from loratune.training.loop import start, steps
from loratune.training.signals import StopRequest, stop_requests
from loratune.training.step import StepMetrics

UNTIMED_STEPS = 2
"""First steps left out of the median: they allocate and warm up."""


@dataclass(frozen=True)
class Fit:
    """What a training left behind.

    Attributes:
        optimizer: in its last state.
        curve: losses along the way, from step 0.
        order: sha256 of the row numbers of every step.
        step_seconds: median time of a step, evaluations left out.
    """

    optimizer: torch.optim.Optimizer
    curve: list[CurvePoint]
    order: str
    step_seconds: float


def fit(
    wrapped: WrappedModel,
    head: LanguageModelHead,
    rows: TrainingSet,
    trainer: TrainerConfig,
    dev_loss: Callable[[], float] | None = None,
    heldout_loss: Callable[[], float] | None = None,
    points: int = 10,
) -> Fit:
    """Train the adapter for the plan's steps and leave the model in eval mode.

    Args:
        wrapped: a freshly wrapped model.
        head: its loss head.
        rows: rows and their order.
        trainer: settings, the seed among them.
        dev_loss: measured before the first step and at about ``points`` places after it.
        heldout_loss: likewise.
        points: of the curve.

    Raises:
        TrainingError: divergence, or nothing that trains.
        Interrupted, Preempted: on SIGINT and SIGTERM, between two steps.
    """
    model, total = wrapped.model, rows.plan.total_steps
    optimizer = start(wrapped, trainer)
    curve = _Curve(model, dev_loss, heldout_loss)
    curve.add(0)
    every = max(1, total // points)
    model.train()
    with stop_requests() as stop:
        for metrics in steps(head, rows, optimizer, trainer):
            curve.count(metrics)
            if metrics.step % every == 0 or metrics.step == total:
                curve.add(metrics.step)
                model.train()
            _stop_if_asked(stop)
    guards.check_finite(model, total)
    model.eval()
    seconds = statistics.median(curve.seconds[UNTIMED_STEPS:] or curve.seconds)
    return Fit(optimizer, curve.points, _order(rows.plan), seconds)


def _order(plan: BatchPlan) -> str:
    """Sha256 of the row numbers of every step."""
    order = hashlib.sha256()
    for step in range(plan.total_steps):
        order.update(repr(plan.micro_batches(step)).encode())
    return order.hexdigest()


class _Curve:
    """Training loss between two points, and the losses of other rows at each."""

    def __init__(
        self,
        model: nn.Module,
        dev_loss: Callable[[], float] | None,
        heldout_loss: Callable[[], float] | None,
    ) -> None:
        self.points: list[CurvePoint] = []
        self._model, self._dev_loss, self._heldout_loss = model, dev_loss, heldout_loss
        self.seconds: list[float] = []
        self._losses: list[float] = []
        self._tokens = 0

    def count(self, metrics: StepMetrics) -> None:
        """Take in a step."""
        self._losses.append(metrics.loss)
        self._tokens += metrics.supervised
        self.seconds.append(metrics.seconds)

    def add(self, step: int) -> None:
        """Measure a point; leaves the model in eval mode."""
        self._model.eval()
        train_loss = statistics.fmean(self._losses) if self._losses else None
        dev_loss = None if self._dev_loss is None else self._dev_loss()
        heldout_loss = None if self._heldout_loss is None else self._heldout_loss()
        self.points.append(
            CurvePoint(
                step=step,
                tokens=self._tokens,
                seconds=sum(self.seconds),
                train_loss=train_loss,
                dev_loss=dev_loss,
                heldout_loss=heldout_loss,
            )
        )
        self._losses = []


def _stop_if_asked(stop: StopRequest) -> None:
    fix = "give the same command again: what is finished is kept"
    if stop.received == signal.SIGINT:
        raise Interrupted("interrupted", fix=fix)
    if stop.received:
        raise Preempted("preempted", fix=fix)
