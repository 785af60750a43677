"""Train the adapter: steps, evaluations, checkpoints, and a clean stop whenever one is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loratune.config.schema import TrainerConfig
from loratune.data.batches import BatchPlan, shard
from loratune.data.collate import Batch, collate, collate_packed
from loratune.data.encoded_rows import EncodedRow
from loratune.errors import TrainingError
from loratune.loss import LanguageModelHead
from loratune.models.fingerprint import tensors_fingerprint
from loratune.runs import processes
from loratune.runs.checkpoint import (
    Checkpoint,
    checkpoint_path,
    load_checkpoint,
    rotate,
    save_checkpoint,
    set_aside_later,
)
from loratune.runs.records import sync_lines, truncate_after
from loratune.runs.run_dir import RunDir
from loratune.surgery import WrappedModel
from loratune.training import guards
from loratune.training.health import HealthMonitor
from loratune.training.memory import memory_errors
from loratune.training.optim import make_optimizer, schedule_factor, set_learning_rate
from loratune.training.prefetch import Prefetch
from loratune.training.record import Recorder, Tracker
from loratune.training.signals import StopRequest, stopped
from loratune.training.state import Progress, capture, load_adapter_state, restore
from loratune.training.step import StepMetrics, train_step

Evaluate = Callable[[], dict[str, float]]
_LESS_MEMORY = "halve trainer.batch_size and double trainer.grad_accum_steps: the same result"


@dataclass(frozen=True)
class TrainingSet:
    """What to train on, in which order.

    Attributes:
        rows: encoded rows.
        plan: the rows of every optimizer step, a function of the seed and the step alone.
        pad_id: token that fills short rows.
        packing: whether rows share sequences.
        max_length: longest packed sequence.
    """

    rows: Sequence[EncodedRow]
    plan: BatchPlan
    pad_id: int
    packing: bool = False
    max_length: int = 0

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The rows with these numbers as one batch."""
        chosen = [self.rows[number] for number in numbers]
        if self.packing:
            return collate_packed(chosen, self.pad_id, self.max_length, numbers)
        return collate(chosen, self.pad_id, numbers)

    def source(self, number: int) -> str:
        """``file:line`` of a row."""
        return self.rows[number].source


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


class _Loop:
    """One training run; the public face is ``train``."""

    def __init__(
        self,
        wrapped: WrappedModel,
        head: LanguageModelHead,
        data: TrainingSet,
        config: TrainerConfig,
        run_dir: RunDir,
        facts: dict[str, Any],
        evaluate: Evaluate | None,
        trackers: Sequence[Tracker],
    ) -> None:
        self.wrapped, self.head, self.data, self.config = wrapped, head, data, config
        self.run_dir, self.facts, self.evaluate = run_dir, facts, evaluate
        self.model = wrapped.model
        guards.refuse_nothing_trainable(self.model)
        self.optimizer = make_optimizer(self.model, wrapped.config, config)
        guards.refuse_zero_rate([group["peak_lr"] for group in self.optimizer.param_groups])
        guards.refuse_small_disk(self.model, run_dir.path, config.keep_checkpoints)
        self.total = data.plan.total_steps
        self.progress = Progress(initial=guards.value_hashes(self.model))
        self.recorder = Recorder(run_dir, self.total, trackers, active=processes.is_main())
        self.health = HealthMonitor(wrapped, self.total)
        self.loss: float | None = None
        self.input = Prefetch(self._micro_batches, next(self.model.parameters()).device)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a verified checkpoint."""
        self.progress = restore(self.wrapped, self.optimizer, checkpoint)

    def run(self) -> bool:
        """Train to the end; return whether evaluations stopped it early."""
        self._tidy()
        watch = guards.GradientWatch(self.progress.seen_gradient, self.progress.watched_steps)
        self.model.train()
        with StopRequest() as stop:
            while self.progress.step < self.total and not self._is_stale():
                self._step(watch)
                self._evaluate_now()
                self._save_now()
                self._stop_if_asked(stop)
        return self._is_stale()

    def _tidy(self) -> None:
        """Drop what an earlier start wrote of the steps that come now."""
        if processes.is_main():
            for path in (self.run_dir.metrics, self.run_dir.timings):
                truncate_after(path, self.progress.step)
            set_aside_later(self.run_dir.checkpoints, self.progress.step)
            self._rotate()

    def _step(self, watch: guards.GradientWatch) -> None:
        step = self.progress.step
        self.recorder.begin_step()
        factor = schedule_factor(step, self.total, self.config)
        set_learning_rate(self.optimizer, factor)
        batches = self.input.batches(step)
        logged = (step + 1) % self.config.log_every == 0 or step + 1 == self.total
        measured = logged and self.health.due(step + 1)
        if measured:
            self.health.before_step()
        metrics = train_step(
            self.head, batches, self.optimizer, self.config.clip_norm, step, self.data.source
        )
        watch.look(self.model, factor)
        self.progress.seen_gradient, self.progress.watched_steps = watch.seen, watch.steps
        self.progress.step = step + 1
        self.progress.tokens += metrics.supervised
        self.loss = metrics.loss
        if logged:
            self._record(metrics, self.health.after_step() if measured else {})

    def _record(self, metrics: StepMetrics, health: dict[str, float]) -> None:
        record = {
            "train/loss": metrics.loss,
            "train/grad_norm": metrics.grad_norm,
            "train/lr": self.optimizer.param_groups[0]["lr"],
            "train/tokens": float(self.progress.tokens),
            **health,
        }
        self.recorder.step(
            self.progress.step,
            record,
            tokens=metrics.tokens,
            padded=metrics.padded,
            dead=self.health.dead if health else (),
        )

    def _micro_batches(self, step: int) -> list[Batch]:
        """This process's share of a step, on the CPU."""
        rank, world = processes.rank(), processes.world_size()
        shares = (shard(rows, rank, world) for rows in self.data.plan.micro_batches(step))
        return [self.data.batch(mine) for mine in shares if mine]

    def _evaluate_now(self) -> None:
        every, step = self.config.eval_every, self.progress.step
        if self.evaluate is None or not every or (step % every and step != self.total):
            return
        self.model.eval()
        metrics = self.evaluate()
        self.model.train()
        self.recorder.evaluation(step, metrics)
        loss = metrics["eval/loss"]
        if self.progress.best_loss is None or loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step = loss, step
            self.progress.stale_evaluations = 0
            self.save()  # the best adapter must outlive the ones that follow
            return
        self.progress.stale_evaluations += 1
        if self._is_stale():
            patience = self.config.early_stop_patience
            self.recorder.note(f"stopped early: {patience} evaluations without a better loss")

    def _is_stale(self) -> bool:
        patience = self.config.early_stop_patience
        return bool(patience) and self.progress.stale_evaluations >= patience

    def _save_now(self) -> None:
        every, step = self.config.save_every, self.progress.step
        if step == self.total or (every and step % every == 0) or self._is_stale():
            self.save()

    def save(self) -> None:
        """Publish a checkpoint of this step, then drop old ones."""
        guards.refuse_non_finite(self.model, self.progress.step)
        tensors = capture(self.wrapped, self.optimizer)
        self._refuse_disagreement(tensors)
        if processes.is_main():
            folder, step = self.run_dir.checkpoints, self.progress.step
            sync_lines(self.run_dir.metrics)  # its lines belong to the checkpoint
            save_checkpoint(folder, step, tensors, self.progress.as_dict(), self.facts)
            self._rotate()
        processes.barrier()

    def _rotate(self) -> None:
        keep = {self.progress.best_step, self.progress.step}
        rotate(self.run_dir.checkpoints, self.config.keep_checkpoints, keep)

    def _refuse_disagreement(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """All processes hold the same adapter, or nobody knows which one to save."""
        if processes.is_distributed():
            values = processes.gather(tensors_fingerprint(tensors["adapter"]))
            if len(set(values)) > 1:
                raise TrainingError(
                    "the processes hold different adapters", where=f"step {self.progress.step}"
                )

    def _stop_if_asked(self, stop: StopRequest) -> None:
        received = max(processes.gather(stop.received))
        if received:
            self.save()
            raise stopped(received, self.progress.step, self.run_dir.path)

    def whereabouts(self) -> str:
        """Step and size of the work in hand, for messages."""
        longest = max(len(row) for row in self.data.rows)
        return (
            f"step {self.progress.step + 1}, trainer.batch_size {self.config.batch_size}, "
            f"rows of up to {longest} tokens"
        )


def train(
    wrapped: WrappedModel,
    head: LanguageModelHead,
    data: TrainingSet,
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
        data: rows and their order.
        config: the trainer's settings.
        run_dir: where metrics and checkpoints go.
        facts: what every checkpoint records about the run.
        checkpoint: verified state to continue from.
        evaluate: measures the current adapter on evaluation rows.
        trackers: further receivers of the metrics.

    Raises:
        TrainingError: divergence, or nothing that trains.
        Preempted: on SIGTERM, after saving.
        Interrupted: on SIGINT, after saving.
        StorageError: if a checkpoint cannot be written; earlier ones are intact.
    """
    started = time.perf_counter()
    loop = _Loop(wrapped, head, data, config, run_dir, facts, evaluate, trackers)
    try:
        with memory_errors(loop.whereabouts, _LESS_MEMORY):
            if checkpoint is not None:
                loop.resume(checkpoint)
            stopped_early = loop.run()
    finally:
        loop.recorder.close()
        loop.input.close()
    guards.refuse_unmoved(wrapped.model, loop.progress.initial, loop.progress.watched_steps)
    best = loop.progress.best_step or loop.progress.step
    if best != loop.progress.step:
        load_adapter_state(wrapped, load_checkpoint(checkpoint_path(run_dir.checkpoints, best)))
    wrapped.model.eval()
    return TrainResult(
        loop.progress.step,
        loop.loss,
        best,
        loop.progress.best_loss,
        time.perf_counter() - started,
        stopped_early,
    )
