"""The one loop: its steps, where it goes on from, and what it builds."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support.command_line import CommandLine
from support.tiny_models import VOCABULARY, tiny_opt

import loratune
from loratune.config.schema import DataConfig, TrainerConfig
from loratune.data.arrangement import Arrangement
from loratune.data.encoded_rows import EncodedRow
from loratune.data.training_set import TrainingSet
from loratune.errors import TrainingError
from loratune.loss.causal_model import LanguageModelHead
from loratune.training.loop import prefetched, start, steps
from loratune.training.state import adapter_tensors

TRAINER = TrainerConfig(steps=6, batch_size=3, grad_accum_steps=2, lr=1e-2, warmup_steps=2, seed=5)


def training_set() -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    rows = [
        EncodedRow(
            torch.randint(3, VOCABULARY, (5 + n % 3,), generator=generator).tolist(),
            ((2, 5 + n % 3),), 2, f"rows.jsonl:{n + 1}",
        )
        for n in range(14)
    ]  # fmt: skip
    return TrainingSet.from_config(rows, Arrangement(1), DataConfig(), TRAINER)


def wrapped_model(**settings: Any) -> Any:
    wrapped = loratune.wrap(tiny_opt(), "lora", targets="all-linear", rank=4, **settings)
    wrapped.model.train()
    return wrapped


def test_every_step_is_over_when_its_metrics_come() -> None:
    wrapped, rows = wrapped_model(), training_set()
    optimizer = start(wrapped, TRAINER)
    begun: list[int] = []
    taken = steps(LanguageModelHead(wrapped.model), rows, optimizer, TRAINER, before=begun.append)
    before = {name: value.clone() for name, value in adapter_tensors(wrapped).items()}
    for number, metrics in enumerate(taken, 1):
        assert begun == list(range(1, number + 1)) and metrics.step == number
        numbers = [n for part in rows.plan.micro_batches(number - 1) for n in part]
        assert metrics.supervised == sum(rows.rows[n].supervised for n in numbers)
        assert metrics.tokens == sum(len(rows.rows[n]) for n in numbers) <= metrics.padded
        after = adapter_tensors(wrapped)
        assert any(not torch.equal(value, after[name]) for name, value in before.items())
        assert all(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        before = {name: value.clone() for name, value in after.items()}
    assert number == rows.plan.total_steps == 6


def test_steps_in_two_parts_are_the_steps_in_one() -> None:
    losses: dict[int, list[float]] = {}
    states = []
    for pause in (0, 4):
        wrapped, rows = wrapped_model(dropout=0.1), training_set()
        head, optimizer = LanguageModelHead(wrapped.model), start(wrapped, TRAINER)
        losses[pause] = []
        for metrics in steps(head, rows, optimizer, TRAINER):
            losses[pause].append(metrics.loss)
            if metrics.step == pause:
                break
        if pause:
            rest = steps(head, rows, optimizer, TRAINER, done=pause)
            losses[pause] += [metrics.loss for metrics in rest]
        states.append(adapter_tensors(wrapped))
    assert losses[0] == losses[4]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


class OnDevice:
    """A batch that remembers which thread collated it and whether its memory was pinned."""

    def __init__(self, step: int) -> None:
        self.step, self.thread, self.is_pinned = step, threading.current_thread(), False

    def pinned(self) -> OnDevice:
        self.is_pinned = True
        return self

    def to(self, device: Any, *, non_blocking: bool = False) -> OnDevice:
        assert self.is_pinned and non_blocking
        return self


def test_on_a_gpu_the_next_steps_batches_are_made_by_a_second_thread() -> None:
    built: list[int] = []

    def build(step: int) -> list[Any]:
        built.append(step)
        return [OnDevice(step)]

    batches = prefetched(build, range(3, 6), torch.device("cuda"))
    for step in (3, 4):
        [batch] = next(batches)
        assert batch.step == step and batch.thread is not threading.current_thread()
    batches.close()
    assert not batch.thread.is_alive()
    assert built[:2] == [3, 4] and set(built) <= {3, 4, 5}
    [[last]] = prefetched(build, range(5, 6), torch.device("cuda"))
    assert last.step == 5


def test_a_start_seeds_every_draw_that_follows() -> None:
    draws = []
    for _ in range(2):
        torch.rand(3)
        start(wrapped_model(), TRAINER)
        draws.append(torch.rand(4))
    assert torch.equal(*draws)


def test_nothing_trains_without_parameters_or_a_rate() -> None:
    with pytest.raises(TrainingError, match="every learning rate is zero"):
        start(wrapped_model(), TrainerConfig(steps=1, lr=0.0))
    wrapped = wrapped_model()
    wrapped.model.requires_grad_(False)
    with pytest.raises(TrainingError, match="0 trainable of"):
        start(wrapped, TRAINER)


def test_a_run_builds_one_optimizer(cli: CommandLine) -> None:
    words = ("train", "recipe=smoke", "stages=[train]", "trainer.steps=2", "trainer.eval_every=0")
    built = ["count@torch.optim.Optimizer.__init__"]
    plus = cli.succeeds(*words, "adapter=lora_plus", "out=plus", faults=built)
    assert len(plus.calls) == 1
    assert "2 steps of 8 × 1 rows" in plus.text
    assert "group B: 8,192 parameters" in plus.text
    projected = ("adapter=lora_fa", "adapter.projected=true", "out=projected")
    assert len(cli.succeeds(*words, *projected, faults=built).calls) == 1
