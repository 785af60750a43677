from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.command_line import CommandLine

from .world import DEMO, World


@pytest.fixture(scope="session")
def session_world(tmp_path_factory: pytest.TempPathFactory, cli: CommandLine) -> World:
    here = tmp_path_factory.mktemp("world")
    world = World(here, cli, here / "base", here / "run", here / "vera")
    shutil.copytree(DEMO, world.base)
    for adapter, run in (("lora", world.run), ("vera", world.vera)):
        cli.succeeds(
            "train", "recipe=smoke", f"adapter={adapter}", "trainer.steps=4", "stages=[train]",
            f"model.path={world.base}", f"out={run}", cwd=here,
        )  # fmt: skip
    return world


@pytest.fixture
def world(session_world: World, tmp_path: Path) -> World:
    return replace(session_world, path=tmp_path)
