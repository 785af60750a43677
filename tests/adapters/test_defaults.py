"""A variant's numbers are said twice, in its dataclass and its recipe, and are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import loratune
from loratune.adapters.registry import config_class, variant_names
from loratune.config.recipes.folders import builtin_recipes
from loratune.config.recipes.variant_settings import variant_settings
from loratune.config.schema import TrainerConfig
from loratune.training.optim import make_optimizer

RECIPES = sorted((Path(builtin_recipes()) / "adapter").glob("*.yaml"))


def test_every_variant_has_a_recipe() -> None:
    assert {path.stem for path in RECIPES} >= set(variant_names())


@pytest.mark.parametrize("variant", variant_names())
def test_the_class_has_the_recipe_s_numbers(variant: str) -> None:
    config = config_class(variant)()
    assert variant_settings(variant) == config
    (path,) = [path for path in RECIPES if path.stem == variant]
    written = OmegaConf.load(path)
    keys = [str(key) for key in written if key != "defaults"]
    assert "lr" in keys and "rank" in keys
    assert {key: written[key] for key in keys} == {key: getattr(config, key) for key in keys}


@pytest.mark.parametrize("variant", variant_names())
def test_library_and_command_line_train_at_the_same_rates(variant: str) -> None:
    wrapped = loratune.wrap(nn.Sequential(nn.Linear(300, 300)), variant, targets=["0"])
    library = loratune.optimizer(wrapped)
    command_line = make_optimizer(wrapped.model, variant_settings(variant), TrainerConfig())
    assert type(library) is type(command_line) is torch.optim.AdamW
    rates = [group["lr"] for group in library.param_groups]
    assert rates == [group["lr"] for group in command_line.param_groups]
