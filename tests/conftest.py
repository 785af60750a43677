"""Shared by all tests: one thread, quiet libraries, no hub."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
from support.command_line import CommandLine


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own: no ./recipes or outputs of somebody else's."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The command line: `cli(*words)` runs `loratune` in a process of its own."""
    command_line = CommandLine(tmp_path_factory.mktemp("cases"))
    yield command_line
    command_line.close()
