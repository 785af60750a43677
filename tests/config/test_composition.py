from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf

from loratune.config.composition import check_composed, translate_composition_error
from loratune.config.convert import register_schemas
from loratune.config.recipes.folders import builtin_recipes, register_user_recipes
from loratune.config.schema import RunConfig
from loratune.errors import ConfigError, SecurityError


@pytest.fixture
def hydra_ready(tmp_path: Path) -> Iterator[Path]:
    store = ConfigStore.instance()
    before = store.repo.copy()
    register_schemas(RunConfig)
    store.store("loratune", {"template": ""}, group="hydra/help")
    register_user_recipes([tmp_path])
    with initialize_config_dir(str(builtin_recipes()), version_base="1.3"):
        yield tmp_path
    register_user_recipes([])
    store.repo = before


def told(*words: str) -> ConfigError:
    with pytest.raises((HydraException, ValueError)) as caught:
        compose("config", list(words))
    error = translate_composition_error(caught.value)
    assert type(error) is ConfigError
    assert len(error.lines()) == 1
    assert "use +" not in str(error)
    return error


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("adapter=vear", "no adapter named 'vear'; adapter=vear; did you mean 'vera'?"),
        ("foo=1", "'foo' is not a setting"),
        ("trainer.stepz=1", "did you mean 'steps'?"),
        ("adapter.lr_ratio=2", "'adapter.lr_ratio' has no effect with the chosen adapter"),
        ("trainer.steps=x", "trainer.steps: Value 'x'"),
        ("trainer.lr=[", "no viable alternative"),
        ("hydra/launcher=nope", "no hydra/launcher named 'nope'"),
        ("hydra/launcher=nope", "pip install 'hydra-nope-launcher'"),
        ("hydra/launcher=submitit_none", "pip install 'loratune[slurm]'"),
        ("trainer.steps=1,2", "add -m"),
        ("model@a.b=demo", "Could not override 'model@a.b'"),
    ],
)
def test_what_hydra_raises_becomes_one_line(hydra_ready: Path, word: str, said: str) -> None:
    assert said in str(told(word))


def test_an_unknown_key_in_a_recipe_names_the_file(hydra_ready: Path) -> None:
    (hydra_ready / "adapter").mkdir()
    (hydra_ready / "adapter" / "zz.yaml").write_text("defaults: [lora, _self_]\nrnak: 8\n")
    error = told("adapter=zz")
    assert "adapter/zz.yaml" in error.where
    assert "did you mean 'rank'?" in error.fix


def test_our_own_errors_pass_through_unchanged() -> None:
    ours = SecurityError("x")
    outer = HydraException("y")
    outer.__cause__ = ours
    assert translate_composition_error(outer) is ours


def test_missing_values_and_dangling_references_are_found_together() -> None:
    config = OmegaConf.create(
        {
            "a": "???",
            "b": {"c": "???", "d": "${a}"},
            "e": ["${nowhere}", 1],
            "f": "${f}",
            "g": "${b}",
            "hydra": {"x": "???"},
        }
    )
    errors = {error.where: error.cause for error in check_composed(config)}
    assert errors == {
        "a": "'a' must be set",
        "b.c": "'b.c' must be set",
        "e[0]": "'${nowhere}' refers to a setting that does not exist",
        "f": "'${f}' cannot be resolved",
    }


def test_a_complete_config_has_no_errors(hydra_ready: Path) -> None:
    assert check_composed(compose("config", ["recipe=demo"])) == []
