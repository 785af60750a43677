"""What a command cannot do without: rows to train on, or an adapter."""

from __future__ import annotations

from pathlib import Path

from loratune.config.schema import RunConfig, Stage
from loratune.errors import ConfigError


def require_rows(config: RunConfig) -> None:
    """Stop before torch is imported if the recipe trains and names no rows.

    Raises:
        ConfigError: if it does.
    """
    if Stage.train in config.stages and config.data.path is None:
        raise ConfigError(
            "there are no rows to train on", where="data.path", fix="set data.path=FILE"
        )


def adapter_folder(run: str | None, adapter_path: str | None) -> Path:
    """The adapter that ``run=DIR`` or ``adapter_path=DIR`` names.

    Raises:
        ConfigError: if neither or both are set, or the run has no adapter.
    """
    if (run is None) == (adapter_path is None):
        raise ConfigError(
            "which adapter?", where="run, adapter_path", fix="set run=DIR or adapter_path=DIR"
        )
    if adapter_path is not None:
        return Path(adapter_path)
    from loratune.runs.run_dir import RunDir

    folder = RunDir.open(str(run)).path
    if not (folder / "adapter").is_dir():
        raise ConfigError(
            "the run has no adapter yet",
            where=str(folder),
            fix=f"finish it: loratune train resume={folder}",
        )
    return folder / "adapter"
