"""Several processes on this machine, through torch's own elastic launcher."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.multiprocessing.errors import record as record_error
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from loratune.config.convert import from_plain, to_plain
from loratune.config.schema import RunConfig
from loratune.errors import LoratuneError, TrainingError
from loratune.runs.checkpoint import published_checkpoints, step_of
from loratune.runs.output import OUTPUTS, fresh_folder
from loratune.runs.run_dir import RunDir, with_run_folder
from loratune.training.signals import stopped

LINGER = 3.0
"""Seconds that a process waits after losing a peer, so that the peer's end is noticed first."""
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL error")


def launch(config: RunConfig) -> None:
    """Start ``launch.nproc`` processes of one run and wait for them.

    When one dies, torch ends the others.  SIGTERM and SIGINT are passed on to all of them.

    Raises:
        LoratuneError: what stopped a process, or which process died of what.
    """
    config = with_run_folder(config)
    if config.out is None:  # chosen here, so that its name is known afterwards
        config = replace(config, out=str(fresh_folder(OUTPUTS / config.name)))
    _quieten()
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.launch.nproc,
        rdzv_endpoint="localhost:0",
        rdzv_backend="c10d",
        run_id=f"loratune-{os.getpid()}",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )
    try:
        elastic_launch(settings, worker)(to_plain(config))
    except ChildFailedError as error:
        raise _explained(error, str(config.out)) from None
    except SignalException as error:
        _end_as(error.sigval, Path(str(config.out)))


def _quieten() -> None:
    """What torch logs about processes that end is said by our own error, in one line."""
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Processes that are killed leave semaphores to Python's tracker, which frees and reports them.
    ignored = "ignore:resource_tracker:UserWarning"
    known = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = f"{known},{ignored}" if known else ignored


@record_error
def worker(values: dict[str, Any]) -> None:
    """One process of a run that ``launch`` started."""
    _quieten()
    try:
        join(from_plain(values, RunConfig))
    except LoratuneError as error:
        raise RuntimeError(_PREFIX + json.dumps(_described(error))) from None


def join(config: RunConfig) -> None:
    """Be one process of the run, under ``launch`` or under torchrun.

    Raises:
        LoratuneError: what stopped the run.
    """
    from loratune.pipeline.run import run

    processes = int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        run(replace(config, launch=replace(config.launch, nproc=processes)))
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _LOST_PEER):
            raise
        time.sleep(LINGER)
        raise TrainingError(
            "another process of this run has ended", where=f"process {os.environ['RANK']}"
        ) from error
    finally:
        dist.destroy_process_group()


_PREFIX = "loratune: "


def _described(error: LoratuneError) -> dict[str, Any]:
    return {**error.as_dict(), "kind": type(error).__name__, "lines": error.lines()}


class _Relayed(LoratuneError):
    """What a process said, with its own words and code."""

    def __init__(self, details: dict[str, Any]) -> None:
        super().__init__(details["cause"], where=details["where"], fix=details["fix"])
        self._lines, self.exit_code = list(details["lines"]), int(details["code"])

    def lines(self) -> list[str]:
        return self._lines


def _explained(error: ChildFailedError, out: str) -> LoratuneError:
    rank, failure = _cause(error)
    message = failure.message
    if isinstance(message, dict):
        message = str(message.get("message", ""))
    if _PREFIX in str(message):
        return _Relayed(json.loads(str(message).split(_PREFIX, 1)[1]))
    how = f"exit code {failure.exitcode}"
    if failure.exitcode < 0:
        how = f"signal {-failure.exitcode} ({signal.Signals(-failure.exitcode).name})"
    return TrainingError(
        f"process {rank} (pid {failure.pid}) died of {how}; all others were ended",
        where=str(message).splitlines()[0] if message and failure.exitcode >= 0 else "launch.nproc",
        fix=f"the checkpoints are intact: loratune train resume={out}",
    )


def _cause(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """A process that a signal killed explains the others, which only lost it."""
    for rank, failure in sorted(error.failures.items()):
        if failure.exitcode < 0:
            return rank, failure
    rank, failure = error.get_first_failure()
    return rank, failure


def _end_as(number: signal.Signals, out: Path) -> None:
    """End as the processes did: saved and resumable, or by the signal itself.

    Raises:
        LoratuneError: naming the newest checkpoint, if there is one.
    """
    saved = published_checkpoints(RunDir(out).checkpoints)
    if saved:
        raise stopped(number, step_of(saved[-1]), out)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
