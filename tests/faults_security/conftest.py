from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.forked import run_cli

from .world import DEMO, World


@pytest.fixture(scope="session")
def session_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    here = tmp_path_factory.mktemp("world")
    world = World(here, here / "base", here / "run", here / "vera")
    shutil.copytree(DEMO, world.base)
    for adapter, run in (("lora", world.run), ("vera", world.vera)):
        outcome = run_cli(
            "train", "recipe=smoke", f"adapter={adapter}", "trainer.steps=4", "stages=[train]",
            f"model.path={world.base}", f"out={run}", cwd=here,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
    return world


@pytest.fixture
def world(session_world: World, tmp_path: Path) -> World:
    return World(tmp_path, session_world.base, session_world.run, session_world.vera)
