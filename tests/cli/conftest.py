"""The command line as a user meets it: words in, output, exit code and a configuration out."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

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
