"""A run is never put among the files of a model or an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from loratune.config.schema import ModelConfig, RunConfig
from loratune.errors import BusyError
from loratune.runs.run_dir import RunDir


def config(tmp_path: Path, out: Path, **changes: object) -> RunConfig:
    base = tmp_path / "base"
    base.mkdir(exist_ok=True)
    return replace(RunConfig(model=ModelConfig(path=str(base))), out=str(out), **changes)


@pytest.mark.parametrize("out", ["base", "base/run", "through/run"])
@pytest.mark.parametrize("act", [RunDir.check, RunDir.create])
def test_a_run_inside_its_base_is_refused(tmp_path: Path, out: str, act: object) -> None:
    (tmp_path / "through").symlink_to(tmp_path / "base")
    with pytest.raises(BusyError, match="lies inside"):
        act(config(tmp_path, tmp_path / out))
    assert not list((tmp_path / "base").iterdir())


def test_a_run_inside_the_adapter_it_continues_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    settings = config(tmp_path, tmp_path / "adapter" / "x", adapter_path=str(tmp_path / "adapter"))
    with pytest.raises(BusyError, match="lies inside"):
        RunDir.check(settings)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "model.safetensors"])
def test_a_folder_that_holds_somebody_elses_model_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).touch()
    with pytest.raises(BusyError, match="holds a model or an adapter"):
        RunDir.check(config(tmp_path, tmp_path / "other"))
