"""The training loop: every training of the package, long or short, takes its steps here."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace

import torch

from loratune.config.schema import TrainerConfig
from loratune.data.training_set import TrainingSet
from loratune.loss.causal_model import LanguageModelHead
from loratune.surgery import WrappedModel
from loratune.training import guards
from loratune.training.optim import make_optimizer
from loratune.training.prefetch import prefetched
from loratune.training.schedule import schedule_factor, set_learning_rate
from loratune.training.state import seed_everything
from loratune.training.step import StepMetrics, train_step


def start(wrapped: WrappedModel, trainer: TrainerConfig) -> torch.optim.Optimizer:
    """Make ready for the first step: seed every generator and build the optimizer.

    Raises:
        TrainingError: if nothing would train, or no learning rate is above zero.
    """
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
        trainer: schedule and clipping.
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
            metrics = train_step(head, batch, optimizer, trainer.clip_norm, step, rows.source)
            yield replace(metrics, seconds=time.perf_counter() - started)
