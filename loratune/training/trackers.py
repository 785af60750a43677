"""Trackers beside ``metrics.jsonl``: each an extra, each behind the same two calls.

Whatever a tracker keeps on this machine lies in the run folder, and none is told a secret: the
recipe is redacted, and command line, environment, code and console are not handed over.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from loratune.config.convert import to_plain
from loratune.config.schema import RunConfig
from loratune.config.secrets import redact, redact_text
from loratune.errors import ConfigError, did_you_mean, raise_together
from loratune.runs.run_dir import RunDir
from loratune.training.record import Tracker

PROJECT = "loratune"


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker may know of a run.

    Attributes:
        run_dir: its folder.
        recipe: the resolved recipe as plain values, secrets hidden.
        resumed_after: the step it goes on from, 0 for a new run.
    """

    run_dir: RunDir
    recipe: dict[str, Any]
    resumed_after: int = 0

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.run_dir.path.resolve().name

    @property
    def identity(self) -> str:
        """The same for every start of this run, another for every other folder."""
        return sha256(str(self.run_dir.path.resolve()).encode()).hexdigest()[:16]


class TensorBoard:
    """Writes event files into ``tensorboard/`` of the run folder."""

    def __init__(self, run: TrackedRun) -> None:
        module = import_module("torch.utils.tensorboard")
        # What a killed start wrote of the steps that come again is hidden.
        purge = run.resumed_after + 1 if run.resumed_after else None
        folder = run.run_dir.path / "tensorboard"
        self._writer = module.SummaryWriter(log_dir=str(folder), purge_step=purge)

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs to Weights & Biases; ``WANDB_MODE=offline`` sends nothing.

    Its files lie in ``wandb/`` of the run folder; ``WANDB_PROJECT`` names another project.
    """

    def __init__(self, run: TrackedRun) -> None:
        wandb = import_module("wandb")
        offline = os.environ.get("WANDB_MODE", "online") != "online"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=run.name,
            id=run.identity,
            resume=None if offline or not run.resumed_after else "allow",
            dir=str(run.run_dir.path),
            config=run.recipe,
            # Its metadata would hold the command line and the git remote, secrets and all.
            settings=wandb.Settings(
                save_code=False, disable_git=True, x_disable_meta=True, console="off", silent=True
            ),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Logs to trackio's database, in ``TRACKIO_DIR`` or else in ``trackio/`` of the run folder.

    trackio has one database a process, so the runs of a sweep share the first run's.
    """

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((run.run_dir.path / "trackio").resolve()))
        self._module = import_module("trackio")
        self._module.init(project=PROJECT, name=run.name, config=run.recipe)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._module.log(values, step=step)

    def close(self) -> None:
        self._module.finish()


_TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Stop before anything heavy if a tracker does not exist or is not installed.

    Raises:
        ConfigError: for each of them.
    """
    raise_together(error for error in map(_problem, names) if error is not None)


def _problem(name: str) -> ConfigError | None:
    if name not in _TRACKERS:
        return ConfigError(
            f"no tracker '{name}'",
            where="trackers",
            fix=did_you_mean(name, _TRACKERS) or f"choose from {', '.join(_TRACKERS)}",
        )
    if find_spec(name) is None:
        return ConfigError(
            f"the tracker '{name}' is not installed",
            where="trackers",
            fix=f"pip install 'loratune[{name}]'",
        )
    return None


def open_trackers(config: RunConfig, run_dir: RunDir, resumed_after: int = 0) -> list[Tracker]:
    """The recipe's trackers, started.

    Args:
        config: names them, and is told to them without its secrets.
        run_dir: where their files go.
        resumed_after: the step that a resumed run goes on from.

    Raises:
        ConfigError: if one does not start; those before it are closed again.
    """
    run = TrackedRun(run_dir, redact(to_plain(config)), resumed_after)
    started: list[Tracker] = []
    for name in config.trackers:
        try:
            started.append(_TRACKERS[name](run))
        except Exception as error:
            for tracker in started:
                tracker.close()
            raise ConfigError(
                f"the tracker '{name}' does not start: {redact_text(str(error))}",
                where="trackers",
                fix="fix that, or leave it out; WANDB_MODE=offline needs no account",
            ) from error
    return started
