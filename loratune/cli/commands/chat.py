"""``loratune chat``: several turns with an adapted model, in a terminal or a pipe."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from loratune.cli.inputs import adapter_folder, check_sampling, names_base, recorded_recipe
from loratune.config.command_line import CommandLine
from loratune.config.schema import RunConfig


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, and how to answer."""

    run: str | None = None
    """A run folder: its adapter, base and prompt template are taken."""
    system: str | None = None
    """A system text, where the adapter's format has one."""
    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 0.0
    """0 is greedy; higher is more random."""
    top_p: float = 1.0
    """Sample from the most likely tokens that sum to this probability."""
    seed: int = 0
    """Seed of sampling."""


def run(config: Config, command_line: CommandLine) -> None:
    """Answer what is typed, or every line of a pipe; /help names the commands."""
    check_sampling(config.max_new_tokens, config.temperature, config.top_p)
    folder = adapter_folder(config.run, config.adapter_path)
    base_named = names_base(command_line.keys, config.run)
    config = recorded_recipe(config, command_line, config.run)
    from loratune.cli.chat_session import ChatSession
    from loratune.generation import Sampling
    from loratune.pipeline.conversation import open_conversation

    words = config.max_new_tokens, config.temperature, config.top_p
    sampling = Sampling(*words, seed=config.seed)
    conversation = open_conversation(config, folder, sampling, config.system, base_named=base_named)
    ChatSession(conversation, interactive=sys.stdin.isatty() and sys.stdout.isatty()).run()
