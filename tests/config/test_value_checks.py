"""Ranges of single settings, and settings that contradict each other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loratune.adapters.registry import config_class
from loratune.config.schema import DataConfig, RunConfig, Stage, TrainerConfig
from loratune.config.value_checks import check_values


def recipe(**changes: object) -> RunConfig:
    trainer = TrainerConfig(steps=5)
    return replace(RunConfig(adapter=config_class("lora")(), trainer=trainer), **changes)


def test_every_value_out_of_range_is_reported_at_once() -> None:
    trainer = TrainerConfig(steps=5, batch_size=0, lr=float("nan"), betas=[0.9, 1.0])
    config = recipe(trainer=trainer, data=DataConfig(max_length=1, limit=0, cache=""))
    assert [str(error) for error in check_values(config)] == [
        "error[2] 1 is out of range; data.max_length; use >= 2",
        "error[2] 0 is out of range; data.limit; use >= 1, or null for all rows",
        "error[2] '' is out of range; data.cache; name a folder, or null for none",
        "error[2] 0 is out of range; trainer.batch_size; use >= 1",
        "error[2] nan is out of range; trainer.lr; use a number >= 0",
        "error[2] [0.9, 1.0] is out of range; trainer.betas; use two numbers in [0, 1)",
    ]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"trainer": TrainerConfig(steps=1, epochs=1.0)}, "trainer"),
        ({"trainer": TrainerConfig()}, "trainer"),
        ({"trainer": TrainerConfig(steps=1, eval_every=2)}, "trainer.eval_every"),
        ({"trainer": TrainerConfig(steps=1, early_stop_patience=2)}, "trainer.early_stop_patience"),
        ({"stages": [Stage.merge]}, "stages"),
        ({"name": "a/b"}, "name"),
        ({"name": "-rf"}, "name"),
        ({"name": " "}, "name"),
        ({"name": "run "}, "name"),
    ],
)
def test_a_contradiction_names_the_setting_to_change(
    changes: dict[str, object], where: str
) -> None:
    assert check_values(recipe()) == []
    (error,) = check_values(recipe(**changes))
    assert error.where == where and error.fix
