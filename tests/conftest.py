"""Shared by all tests: one thread, quiet libraries, no hub."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("COLUMNS", None)  # the width of whoever runs the tests

from collections.abc import Iterator
from typing import Any

import pytest
from faults.tally import TALLY
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


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add what a process of pytest-xdist counted."""
    for name, number in getattr(node, "workeroutput", {}).get("tally", {}).items():
        TALLY.add(name, number)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tally"] = TALLY.counts()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    lines = TALLY.lines()
    if lines:
        terminalreporter.section("fault suite: tally")
        for line in lines:
            terminalreporter.line(line)
