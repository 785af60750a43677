"""What ``resume=auto`` and ``resume=DIR`` name, decided without torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loratune.config.schema import RunConfig
from loratune.errors import ConfigError

AUTO = "auto"


def names_checkpoint(resume: str) -> bool:
    """Whether ``resume=DIR`` names one checkpoint of a run and not the run."""
    return Path(resume).parent.name == "checkpoints"


def resumed_run(config: RunConfig) -> Path | None:
    """The run folder that ``resume=DIR`` names: the folder itself, or the run of a checkpoint."""
    if config.resume in (None, AUTO):
        return None
    path = Path(str(config.resume))
    return path.parent.parent if names_checkpoint(str(path)) else path


def with_run_folder(config: RunConfig) -> RunConfig:
    """The recipe whose ``out`` is the folder that ``resume=DIR`` names; others stay as they are.

    Raises:
        ConfigError: ``resume=auto`` without ``out``, or a folder that does not exist.
    """
    if config.resume == AUTO and config.out is None:
        raise ConfigError(
            "resume=auto needs the run's folder", where="resume", fix="set out=DIR, or resume=DIR"
        )
    run = resumed_run(config)
    if run is None:
        return config
    if not Path(str(config.resume)).is_dir():
        raise ConfigError(
            "no such folder", where=f"resume={config.resume}", fix="name a run or checkpoint folder"
        )
    return replace(config, out=str(run))
