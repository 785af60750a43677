"""Trackers beside ``metrics.jsonl``: each an extra, each behind the same two calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from loratune.config.convert import to_plain
from loratune.config.schema import RunConfig
from loratune.config.secrets import redact
from loratune.errors import ConfigError, did_you_mean
from loratune.run_dir import RunDir
from loratune.training.record import Tracker


class TensorBoard:
    """Writes event files into the run folder."""

    def __init__(self, config: RunConfig, run_dir: RunDir) -> None:
        module = _optional("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(log_dir=str(run_dir.path / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs to Weights & Biases; WANDB_MODE=offline keeps everything in the run folder."""

    def __init__(self, config: RunConfig, run_dir: RunDir) -> None:
        self._run = _optional("wandb", "wandb").init(
            project="loratune",
            name=run_dir.path.name,
            dir=str(run_dir.path),
            config=redact(to_plain(config)),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Logs to trackio's local database."""

    def __init__(self, config: RunConfig, run_dir: RunDir) -> None:
        self._module = _optional("trackio", "trackio")
        self._module.init(
            project="loratune", name=run_dir.path.name, config=redact(to_plain(config))
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._module.log({**values, "step": step})

    def close(self) -> None:
        self._module.finish()


_TRACKERS: dict[str, Callable[[RunConfig, RunDir], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Stop before anything heavy if a tracker does not exist.

    Raises:
        ConfigError: naming it.
    """
    for name in names:
        if name not in _TRACKERS:
            raise ConfigError(
                f"no tracker '{name}'",
                where="trackers",
                fix=did_you_mean(name, _TRACKERS) or f"choose of {', '.join(_TRACKERS)}",
            )


def open_trackers(config: RunConfig, run_dir: RunDir) -> list[Tracker]:
    """The recipe's trackers, started."""
    return [_TRACKERS[name](config, run_dir) for name in config.trackers]


def _optional(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the tracker '{extra}' is not installed",
            where="trackers",
            fix=f"pip install 'loratune[{extra}]'",
        ) from error
