"""``loratune gate``: exit code 0 where a run is what its recipe demands, else 11."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

from loratune.cli.arguments import TableOrJson
from loratune.cli.inputs import adapter_folder, recorded_recipe, require_metrics
from loratune.config.command_line import CommandLine
from loratune.config.schema import RunConfig
from loratune.config.settings import GROUPS
from loratune.errors import ConfigError
from loratune.runs.run_dir import RunDir, check_result_file
from loratune.scoring import registry


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, whose ``gate`` says what is demanded, and the run to judge."""

    run: str | None = None
    """The run folder: its own recipe is taken; of recipe=NAME only what gate and evaluate say."""
    format: TableOrJson = TableOrJson.table
    """What is printed: table or json."""
    out: str | None = None
    """A JSON file for the result."""
    junit: str | None = None
    """An XML file for it, as CI servers read test results."""


def run(config: Config, command_line: CommandLine) -> None:
    """Judge the run, and raise every demand that is not met."""
    if config.run is None:
        raise ConfigError("which run?", where="run", fix="set run=DIR")
    run_dir = RunDir.open(config.run)
    adapter_folder(config.run, None)
    out, junit, as_json = config.out, config.junit, config.format is TableOrJson.json
    for path in filter(None, (out, junit)):
        check_result_file(Path(path))
    config = _judged(config, command_line)
    require_metrics(config)
    if config.gate.metric != "loss":
        registry.require_metrics([config.gate.metric], key="gate.metric")
    from loratune import files
    from loratune.pipeline.gate import gate
    from loratune.tables import show

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        result = gate(config, run_dir)
        show(result.table())
    if out is not None:
        files.write_json(Path(out), result.to_dict())
    if junit is not None:
        files.write_text(Path(junit), result.to_junit())
    if as_json:
        print(files.to_json(result.to_dict()), end="")
    result.raise_failures()


def _judged(config: Config, command_line: CommandLine) -> Config:
    """The run's own recipe, with the demands of another one where one is chosen.

    Raises:
        ConfigError: for any other group: base, adapter and rows are the run's.
    """
    chosen = command_line.keys & set(GROUPS) - {"recipe"}
    if chosen:
        [group, *_] = sorted(chosen)
        cause = f"'{group}' is fixed for a finished run"
        raise ConfigError(cause, where=group, fix="choose a recipe with a gate, or set gate.KEY")
    words = [one for one in command_line.overrides if one.key_or_group != "recipe"]
    own = recorded_recipe(config, replace(command_line, overrides=tuple(words)), config.run)
    if command_line.recipe is None:
        return own
    return replace(own, gate=config.gate, evaluate=config.evaluate)
