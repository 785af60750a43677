"""Schedules against closed forms; learning rates and groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import loratune
from loratune.adapters.registry import config_class, variant_names
from loratune.config.schema import Schedule, TrainerConfig
from loratune.training.optim import (
    learning_rate,
    make_optimizer,
    schedule_factor,
    set_learning_rate,
    warmup_steps,
    warmup_warning,
)
from loratune.training.state import load_optimizer_tensors, optimizer_tensors
from tests.support.variants import ranked


def wrapped(variant: str = "lora", **settings: object):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    return loratune.wrap(model, variant, targets=["0", "1"], **settings)


@pytest.mark.parametrize("warmup", [0, 4])
def test_linear_schedule_rises_then_falls_to_zero(warmup: int) -> None:
    trainer = TrainerConfig(schedule=Schedule.linear, warmup_steps=warmup)
    factors = [schedule_factor(step, 20, trainer) for step in range(21)]
    assert factors[:warmup] == [(step + 1) / (warmup + 1) for step in range(warmup)]
    assert factors[warmup] == 1.0
    assert factors[20] == 0.0
    assert all(a > b for a, b in zip(factors[warmup:], factors[warmup + 1 :], strict=False))


def test_cosine_schedule_is_half_a_cosine() -> None:
    trainer = TrainerConfig(schedule=Schedule.cosine)
    for step in range(11):
        expected = (1 + math.cos(math.pi * step / 10)) / 2
        assert schedule_factor(step, 10, trainer) == pytest.approx(expected)


def test_constant_schedule_stays() -> None:
    trainer = TrainerConfig(schedule=Schedule.constant, warmup_steps=1)
    assert [schedule_factor(step, 5, trainer) for step in range(5)] == [0.5, 1, 1, 1, 1]


def test_lora_plus_keeps_its_ratio_at_every_step() -> None:
    model = wrapped("lora_plus", lr_ratio=16.0)
    trainer = TrainerConfig(lr=1e-3, schedule=Schedule.cosine, warmup_steps=3)
    optimizer = make_optimizer(model.model, model.config, trainer)
    names = [group["name"] for group in optimizer.param_groups]
    slow, fast = names.index("A"), names.index("B")
    for step in range(20):
        set_learning_rate(optimizer, schedule_factor(step, 20, trainer))
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[fast] == pytest.approx(16 * rates[slow], rel=1e-12)


def test_weight_decay_reaches_every_group_of_matrices() -> None:
    for variant in variant_names():
        model = wrapped(variant, **ranked(variant, 4))
        trainer = TrainerConfig(weight_decay=0.1)
        optimizer = make_optimizer(model.model, model.config, trainer)
        assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups)


def test_an_explicit_rate_wins_over_the_variant_s_scaled_one() -> None:
    config = config_class("vera")(lr=0.5)
    assert learning_rate(TrainerConfig(lr_scale=0.1), config) == pytest.approx(0.05)
    assert learning_rate(TrainerConfig(lr_scale=0.1, lr=0.3), config) == 0.3


@pytest.mark.parametrize(
    ("variant", "settings"),
    [*((name, ranked(name, 4)) for name in variant_names()), ("lora_fa", {"projected": True})],
)
def test_optimizer_state_round_trips_bit_for_bit(variant: str, settings: dict[str, bool]) -> None:

    def steps(model, optimizer, count: int) -> None:
        for number in range(count):
            torch.manual_seed(number)
            optimizer.zero_grad()
            model.model(torch.randn(3, 8)).square().sum().backward()
            optimizer.step()

    trainer = TrainerConfig(lr=1e-2)
    one = wrapped(variant, **settings)
    first = make_optimizer(one.model, one.config, trainer)
    steps(one, first, 3)
    saved = {key: value.clone() for key, value in optimizer_tensors(first, one.model).items()}
    other = wrapped(variant, **settings)
    other.model.load_state_dict(one.model.state_dict())
    second = make_optimizer(other.model, other.config, trainer)
    load_optimizer_tensors(second, other.model, saved)
    steps(one, first, 2)
    steps(other, second, 2)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_warm_up_is_a_number_of_steps_or_a_share_of_them() -> None:
    ratio = TrainerConfig(warmup_ratio=0.1)
    assert [warmup_steps(total, ratio) for total in (2, 10, 1000)] == [0, 1, 100]
    assert warmup_steps(1000, TrainerConfig(warmup_steps=30, warmup_ratio=0.1)) == 30
    factors = [schedule_factor(step, 20, ratio) for step in range(3)]
    assert factors == [1 / 3, 2 / 3, 1.0]


@pytest.mark.parametrize(("steps", "said"), [(6, True), (7, True), (5, False)])
def test_a_warm_up_as_long_as_the_training_is_said(steps: int, said: bool) -> None:
    assert bool(warmup_warning(6, TrainerConfig(warmup_steps=steps))) is said
    assert not warmup_warning(0, TrainerConfig())
