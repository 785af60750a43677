"""``loratune evaluate``: measure base and adapted model side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loratune.cli.arguments import TableOrJson
from loratune.cli.inputs import adapter_folder, names_base, recorded_recipe, require_metrics
from loratune.config.command_line import CommandLine
from loratune.config.schema import RunConfig
from loratune.errors import ConfigError
from loratune.runs.run_dir import check_result_file


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, and the run whose adapter to measure."""

    run: str | None = None
    """A run folder: its adapter, base and evaluation rows are taken, unless overridden."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-eval to measure, in place of the rows (pip install 'loratune[lm-eval]')."""
    tasks_path: str | None = None
    """A folder of YAML files that define tasks of one's own, as lm-eval's --include_path."""
    tasks_limit: int | None = None
    """First documents of each task; null takes all."""
    format: TableOrJson = TableOrJson.table
    """What is printed: table or json."""
    out: str | None = None
    """A JSON file for the scores, or a folder for its evaluation.json; a run's own stays."""
    golden: str | None = None
    """A JSON file for golden prompts, which ``verify served=URL`` asks a server."""


def run(config: Config, command_line: CommandLine) -> None:
    """Measure the adapter of ``run=DIR``, or of ``adapter_path=DIR`` on ``model.path=DIR``."""
    folder = adapter_folder(config.run, config.adapter_path)
    out, as_json = _scores_file(config.out), config.format is TableOrJson.json
    golden = _golden_file(config.golden, config.tasks)
    names, own, limit = config.tasks, config.tasks_path, config.tasks_limit
    config, keys = recorded_recipe(config, command_line, config.run), command_line.keys
    if not names:
        require_metrics(config)
    from loratune.pipeline import commands

    commands.evaluate_adapter(
        config,
        folder,
        base_named=names_base(keys, config.run),
        own_template="data.template" in keys,
        out=out,
        as_json=as_json,
        golden=golden,
        tasks=commands.Tasks(names, Path(own) if own else None, limit) if names else None,
    )


def _scores_file(out: str | None) -> Path | None:
    """The file that ``out`` names.

    Raises:
        LoratuneError: if it is a file of a model, an adapter, a checkpoint or a finished run.
    """
    if out is None:
        return None
    path = Path(out) / "evaluation.json" if Path(out).is_dir() else Path(out)
    check_result_file(path)
    return path


def _golden_file(golden: str | None, tasks: Sequence[str]) -> Path | None:
    """The file that ``golden`` names.

    Raises:
        LoratuneError: if it is a file of a model, an adapter, a checkpoint or a finished run, or
            tasks take the place of the rows that it is made of.
    """
    if golden is None:
        return None
    if tasks:
        cause = "golden prompts are rows of the run, and tasks take their place"
        raise ConfigError(cause, where="golden", fix="remove tasks, or golden")
    check_result_file(Path(golden))
    return Path(golden)
