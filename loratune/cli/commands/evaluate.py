"""``loratune evaluate``: measure base and adapted model side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratune import files
from loratune.cli.hydra_app import given_keys
from loratune.cli.recorded import names_base, recorded_recipe
from loratune.config.schema import RunConfig
from loratune.errors import ConfigError
from loratune.runs.run_dir import RunDir


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, and the run whose adapter to measure."""

    run: str | None = None
    """A run folder: its adapter, base and evaluation rows are taken, unless overridden."""
    format: str = "table"
    """What is printed: table or json."""
    out: str | None = None
    """A JSON file for the scores, or a folder for its evaluation.json; a run's own stays."""


def run(config: Config, overrides: list[str]) -> None:
    """Measure the adapter of ``run=DIR``, or of ``adapter_path=DIR`` on ``model.path=DIR``."""
    check_format(config.format, ("table", "json"))
    folder = adapter_folder(config.run, config.adapter_path)
    out, as_json = _scores_file(config.out), config.format == "json"
    config, keys = recorded_recipe(config, overrides, config.run), given_keys(overrides)
    from loratune.pipeline import commands

    commands.evaluate_adapter(
        config,
        folder,
        base_named=names_base(keys, config.run),
        own_template="data.template" in keys,
        out=out,
        as_json=as_json,
    )


def _scores_file(out: str | None) -> Path | None:
    """The file that ``out`` names.

    Raises:
        ConfigError: if it is one of a finished run's records.
    """
    if out is None:
        return None
    path = Path(out) / "evaluation.json" if Path(out).is_dir() else Path(out)
    if path.name in _sealed_records(path.parent):
        raise ConfigError(
            "a finished run's records are sealed", where=str(path), fix="set out to another file"
        )
    return path


def _sealed_records(folder: Path) -> set[str]:
    summary = RunDir(folder).summary
    try:
        return {summary.name, *files.read_json(summary)["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def adapter_folder(run: str | None, adapter_path: str | None) -> Path:
    """The adapter that ``run=DIR`` or ``adapter_path=DIR`` names.

    Raises:
        ConfigError: if neither or both are given.
    """
    if (run is None) == (adapter_path is None):
        raise ConfigError(
            "which adapter?", where="run, adapter_path", fix="set run=DIR or adapter_path=DIR"
        )
    if adapter_path is not None:
        return Path(adapter_path)
    folder = Path(str(run))
    if not (folder / "recipe.yaml").is_file():
        raise ConfigError(
            "this is no run folder", where=str(folder), fix="name one that `loratune train` made"
        )
    if not (folder / "adapter").is_dir():
        raise ConfigError(
            "the run has no adapter yet",
            where=str(folder),
            fix=f"finish it: loratune train resume={folder}",
        )
    return folder / "adapter"


def check_format(name: str, choices: tuple[str, ...]) -> None:
    """Stop if an output format does not exist.

    Raises:
        ConfigError: naming the choices.
    """
    if name not in choices:
        raise ConfigError(
            f"no format '{name}'", where="format", fix=f"choose one of {', '.join(choices)}"
        )
