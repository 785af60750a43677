"""The command line as a user meets it: words in, output, exit code and a configuration out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from loratune.cli.dispatch import dispatch
from loratune.cli.hydra_app import run_app
from loratune.config.schema import RunConfig


@pytest.fixture
def composed() -> Callable[..., RunConfig]:
    """Compose the words of a command without running it."""

    def compose(*words: str, command: str = "train", schema: type = RunConfig) -> RunConfig:
        found: list[RunConfig] = []
        module = ModuleType("command")
        module.Config = schema
        module.run = lambda config, overrides: found.append(config)
        run_app(command, module, list(words))
        return found[0]

    return compose


@pytest.fixture
def loratune(capsys) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: exit code, standard output, standard error."""

    def run(command: str, *words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = dispatch(command, list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def run_python(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """A fresh interpreter."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
