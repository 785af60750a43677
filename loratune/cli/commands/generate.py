"""``loratune generate``: answers from base and adapted model."""

from __future__ import annotations

from dataclasses import dataclass

from loratune.cli.inputs import adapter_folder, check_sampling, names_base, recorded_recipe
from loratune.config.command_line import CommandLine
from loratune.config.schema import RunConfig
from loratune.errors import ConfigError


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, and what to answer."""

    run: str | None = None
    """A run folder: its adapter, base and prompt template are taken."""
    prompt: str | None = None
    """One prompt to answer."""
    system: str | None = None
    """A system text for ``prompt``, where the adapter's format has one."""
    prompts: str | None = None
    """A file of rows to answer, in the format the adapter was trained on."""
    max_new_tokens: int = 64
    """Longest answer."""
    temperature: float = 0.0
    """0 is greedy; higher is more random."""
    top_p: float = 1.0
    """Sample from the most likely tokens that sum to this probability."""
    seed: int = 0
    """Seed of sampling."""
    base: bool = True
    """Answer with the base model as well."""


def run(config: Config, command_line: CommandLine) -> None:
    """Answer ``prompt=TEXT`` or every row of ``prompts=FILE``, one JSON line each."""
    if (config.prompt is None) == (config.prompts is None):
        cause = "nothing to answer" if config.prompt is None else "prompt and prompts are both set"
        raise ConfigError(cause, where="prompt, prompts", fix="set prompt=TEXT or prompts=FILE")
    if config.system is not None and config.prompt is None:
        cause = "system has no effect on a file of rows"
        raise ConfigError(cause, where="system", fix="write it into the rows")
    check_sampling(config.max_new_tokens, config.temperature, config.top_p)
    folder = adapter_folder(config.run, config.adapter_path)
    config = recorded_recipe(config, command_line, config.run)
    from loratune.generation import Sampling
    from loratune.pipeline import commands

    sampling = Sampling(
        config.max_new_tokens,
        config.temperature,
        config.top_p,
        config.evaluate.batch_size,
        config.seed,
    )
    commands.generate(
        config,
        folder,
        base_named=names_base(command_line.keys, config.run),
        prompt=config.prompt,
        prompts=config.prompts,
        system=config.system,
        sampling=sampling,
        with_base=config.base,
    )
