"""The training loop: every training of the package, long or short, takes its steps here."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import torch

from loratune.config.schema import TrainerConfig
from loratune.data.collate import Batch
from loratune.data.training_set import TrainingSet
from loratune.loss.causal_model import LanguageModelHead
from loratune.surgery import WrappedModel
from loratune.training import guards
from loratune.training.optim import make_optimizer, schedule_factor, set_learning_rate
from loratune.training.sharding import drop_gathered
from loratune.training.state import seed_everything
from loratune.training.step import StepMetrics, train_step


def start(wrapped: WrappedModel, trainer: TrainerConfig) -> torch.optim.Optimizer:
    """Make ready for the first step: seed every generator and build the optimizer.

    Raises:
        TrainingError: if nothing would train, or no learning rate is above zero.
    """
    drop_gathered(wrapped.model)
    guards.require_trainable(wrapped.model)
    seed_everything(trainer.seed)
    optimizer = make_optimizer(wrapped.model, wrapped.config, trainer)
    guards.require_learning_rate(optimizer)
    return optimizer


def steps(
    head: LanguageModelHead,
    rows: TrainingSet,
    optimizer: torch.optim.Optimizer,
    trainer: TrainerConfig,
    *,
    done: int = 0,
    before: Callable[[int], None] = lambda step: None,
) -> Generator[StepMetrics, None, None]:
    """Take the plan's optimizer steps one by one; each is over when its metrics are yielded.

    Gradients stay until the next step begins.  The caller decides what happens in between:
    records, evaluations, checkpoints, signals.

    Args:
        head: the model in training mode, giving summed losses.
        rows: what to train on, in which order.
        optimizer: from ``start``.
        trainer: schedule, clipping, determinism.
        done: steps that were taken before, by the run that this one resumes.
        before: called with a step's number (from 1) when it begins.

    Raises:
        TrainingError: if a loss or a gradient is NaN or infinite; nothing was applied.
    """
    device = next(head.model.parameters()).device
    total = rows.plan.total_steps
    with closing(prefetched(rows.micro_batches, range(done, total), device)) as batches:
        for step in range(done, total):
            started = time.perf_counter()
            before(step + 1)
            set_learning_rate(optimizer, schedule_factor(step, total, trainer))
            batch = next(batches)
            metrics = train_step(
                head,
                batch,
                optimizer,
                trainer.clip_norm,
                step,
                rows.source,
                rows.sources,
                deterministic=trainer.deterministic,
            )
            yield replace(metrics, seconds=time.perf_counter() - started)


def prefetched(
    build: Callable[[int], list[Batch]], steps: range, device: torch.device
) -> Generator[list[Batch], None, None]:
    """The batches of every step, on the device.

    On CUDA the next step's batches are collated into pinned memory by a second thread and copied
    without waiting.  On a CPU that thread would only take time from the arithmetic: there each
    step's batches are made when it begins.

    Args:
        build: step number to this process's batches, on the CPU.
        steps: numbers of the steps.
        device: where the model is.
    """
    if device.type != "cuda":
        for step in steps:
            yield [batch.to(device) for batch in build(step)]
        return

    def pinned(step: int) -> list[Batch]:
        return [batch.pinned() for batch in build(step)]

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(pinned, steps.start)
        for step in steps:
            batches = following.result()
            following = pool.submit(pinned, step + 1)
            yield [batch.to(device, non_blocking=True) for batch in batches]
