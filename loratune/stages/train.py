"""Train the adapter: steps, evaluations, checkpoints, and a clean stop whenever one is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from loratune.config.schema import TrainerConfig
from loratune.data.cached_rows import row_lengths
from loratune.data.mixture import seen_line
from loratune.data.training_set import TrainingSet
from loratune.loss.causal_model import LanguageModelHead
from loratune.runs import processes
from loratune.runs.checkpoint import Checkpoint
from loratune.runs.run_dir import RunDir
from loratune.surgery import WrappedModel
from loratune.training import guards
from loratune.training.checkpoints import Checkpoints
from loratune.training.health import HealthMonitor
from loratune.training.loop import start, steps
from loratune.training.optim import group_lines, learning_rate
from loratune.training.record import Recorder, Tracker
from loratune.training.signals import StopRequest, stop_requests, stopped
from loratune.training.step import StepMetrics
from loratune.training.torch_errors import memory_errors

Evaluate = Callable[[], dict[str, float]]
_LESS_MEMORY = "halve trainer.batch_size and double trainer.grad_accum_steps: the same result"


@dataclass(frozen=True)
class TrainResult:
    """What training came to.

    Attributes:
        steps: optimizer steps done.
        loss: mean training loss of the last step.
        best_step: step whose adapter the run keeps (the last one where nothing was evaluated).
        best_loss: its evaluation loss, if there was an evaluation.
        seconds: wall time of this process's part.
        stopped_early: whether evaluations stopped improving.
    """

    steps: int
    loss: float | None
    best_step: int
    best_loss: float | None
    seconds: float
    stopped_early: bool


def train(
    wrapped: WrappedModel,
    head: LanguageModelHead,
    rows: TrainingSet,
    config: TrainerConfig,
    run_dir: RunDir,
    *,
    facts: dict[str, Any],
    checkpoint: Checkpoint | None = None,
    evaluate: Evaluate | None = None,
    trackers: Sequence[Tracker] = (),
) -> TrainResult:
    """Train what has ``requires_grad`` and leave the best adapter in the model.

    Args:
        wrapped: model with adapters, on its device.
        head: gives summed losses without full logits.
        rows: what to train on, in which order.
        config: the trainer's settings.
        run_dir: where metrics and checkpoints go.
        facts: what every checkpoint records about the run.
        checkpoint: verified state to continue from.
        evaluate: measures the current adapter on evaluation rows.
        trackers: further receivers of the metrics; closed at the end, whatever happens.

    Raises:
        TrainingError: divergence, or nothing that trains.
        Preempted: on SIGTERM, after saving.
        Interrupted: on SIGINT, after saving.
        StorageError: if a checkpoint cannot be written; earlier ones are intact.
    """
    started = time.perf_counter()
    total = rows.plan.total_steps
    with closing(Recorder(run_dir, total, trackers, active=processes.is_main())) as recorder:
        optimizer = start(wrapped, config)
        for line in _plan_lines(wrapped, rows, config, optimizer):
            recorder.note(line)
        checkpoints = Checkpoints(wrapped, optimizer, run_dir, facts, config.keep_checkpoints)
        log = _Log(recorder, HealthMonitor(wrapped, total), config.log_every, total)
        training = _Training(head, rows, config, checkpoints, log, evaluate)
        with memory_errors(training.describe_position, _LESS_MEMORY):
            checkpoints.resume(checkpoint)
            training.run()
    progress = checkpoints.progress
    guards.require_moved(wrapped.model, progress.initial, progress.watched_steps)
    best = checkpoints.load_best()
    wrapped.model.eval()
    seconds, early = time.perf_counter() - started, training.is_stale()
    return TrainResult(progress.step, training.loss, best, progress.best_loss, seconds, early)


def _plan_lines(
    wrapped: WrappedModel,
    rows: TrainingSet,
    config: TrainerConfig,
    optimizer: torch.optim.Optimizer,
) -> list[str]:
    """How much is trained at which rates, in words."""
    plan, weight = rows.plan, next(wrapped.model.parameters())
    groups = group_lines(optimizer)
    passes = "epochs, each drawing" if plan.mixture else "passes over"
    return [
        f"{plan.total_steps} steps of {config.batch_size} × {config.grad_accum_steps} rows "
        f"= {plan.total_steps / plan.steps_per_epoch:.2f} {passes} {len(rows.rows):,} rows; "
        f"lr {learning_rate(config, wrapped.config):g}, {weight.dtype}, {weight.device}",
        *([seen_line(plan.times_seen())] if plan.mixture else []),
        *(groups if len(groups) > 1 else []),
    ]


class _Log:
    """Records every ``every``-th step and the last, with the training's health where it is due."""

    def __init__(self, recorder: Recorder, health: HealthMonitor, every: int, total: int) -> None:
        self.recorder, self.health = recorder, health
        self.every, self.total = every, total

    def begin(self, step: int) -> None:
        """Note what a step's health is measured by."""
        if self._is_logged(step) and self.health.due(step):
            self.health.before_step()

    def step(self, metrics: StepMetrics, rate: float, supervised: int) -> None:
        """Record a step, its learning rate and the supervised tokens since the first step."""
        if not self._is_logged(metrics.step):
            return
        health = self.health.after_step() if self.health.due(metrics.step) else {}
        record = {
            "train/loss": metrics.loss,
            "train/grad_norm": metrics.grad_norm,
            "train/lr": rate,
            "train/tokens": float(supervised),
            **{f"train/loss/{name}": loss for name, loss in metrics.source_losses.items()},
            **health,
        }
        self.recorder.step(
            metrics.step,
            record,
            seconds=metrics.seconds,
            tokens=metrics.tokens,
            padded=metrics.padded,
            dead=self.health.dead if health else (),
        )

    def _is_logged(self, step: int) -> bool:
        return step % self.every == 0 or step == self.total


@dataclass
class _Training:
    """The steps of one run and what happens between them; ``loss`` is the last step's."""

    head: LanguageModelHead
    rows: TrainingSet
    config: TrainerConfig
    checkpoints: Checkpoints
    log: _Log
    evaluate: Evaluate | None
    loss: float | None = None

    def run(self) -> None:
        """Train to the end, or until evaluations stop improving."""
        if self.is_stale():
            return
        optimizer, done = self.checkpoints.optimizer, self.checkpoints.progress.step
        self.head.model.train()
        taken = steps(
            self.head, self.rows, optimizer, self.config, done=done, before=self.log.begin
        )
        with stop_requests() as stop, closing(taken):
            for metrics in taken:
                self._count(metrics)
                self._evaluate_if_due()
                self._save_if_due()
                self._stop_if_asked(stop)
                if self.is_stale():
                    break

    def is_stale(self) -> bool:
        """Whether evaluations stopped improving."""
        return self.checkpoints.progress.is_stale(self.config.early_stop_patience)

    def describe_position(self) -> str:
        """Step and size of the work in hand, for messages."""
        longest = max(row_lengths(self.rows.rows))
        return (
            f"step {self.checkpoints.progress.step + 1}, "
            f"trainer.batch_size {self.config.batch_size}, rows of up to {longest} tokens"
        )

    def _count(self, metrics: StepMetrics) -> None:
        optimizer, progress = self.checkpoints.optimizer, self.checkpoints.progress
        guards.watch_gradients(self.head.model, optimizer, progress)
        progress.step = metrics.step
        progress.tokens += metrics.supervised
        self.loss = metrics.loss
        self.log.step(metrics, optimizer.param_groups[0]["lr"], progress.tokens)

    def _evaluate_if_due(self) -> None:
        if self.evaluate is None or not self._is_due(self.config.eval_every):
            return
        self.head.model.eval()
        metrics = self.evaluate()
        self.head.model.train()
        progress, recorder = self.checkpoints.progress, self.log.recorder
        recorder.evaluation(progress.step, metrics)
        if progress.count_evaluation(metrics["eval/loss"]):
            self.checkpoints.save()  # the best adapter must outlive the ones that follow
        elif self.is_stale():
            patience = self.config.early_stop_patience
            recorder.note(f"stopped early: {patience} evaluations without a better loss")

    def _save_if_due(self) -> None:
        if self._is_last() or self._is_due(self.config.save_every) or self.is_stale():
            self.checkpoints.save()

    def _is_due(self, every: int) -> bool:
        return bool(every) and (self.checkpoints.progress.step % every == 0 or self._is_last())

    def _is_last(self) -> bool:
        return self.checkpoints.progress.step == self.rows.plan.total_steps

    def _stop_if_asked(self, stop: StopRequest) -> None:
        received = max(processes.gather(stop.received))
        if received:
            self.checkpoints.save()
            step, folder = self.checkpoints.progress.step, self.checkpoints.run_dir.path
            raise stopped(received, step, folder)
