"""Several processes on this machine, through torch's own elastic launcher."""

from __future__ import annotations

import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.multiprocessing.errors import record as record_error
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from loratune.config.convert import from_plain, to_plain
from loratune.config.schema import RunConfig
from loratune.console import say
from loratune.errors import LoratuneError
from loratune.pipeline.joining import join
from loratune.runs.checkpoint import published_checkpoints, step_of
from loratune.runs.notices import LostProcessError, RelayedError, described, is_lost_process
from loratune.runs.output import OUTPUTS, fresh_folder
from loratune.runs.run_dir import AUTO, RunDir, names_checkpoint, with_run_folder
from loratune.training.signals import stopped

_PREFIX = "loratune: "


def launch(config: RunConfig) -> None:
    """Start ``launch.nproc`` processes of one run and wait for them.

    When one dies, torch ends the others, and all are started again from the newest checkpoint, up
    to ``launch.max_restarts`` times.  What a process says itself would be said again: it ends the
    run.  SIGTERM and SIGINT are passed on to all processes.

    Raises:
        LoratuneError: what stopped a process, or which process died of what.
    """
    config = with_run_folder(config)
    if config.out is None:  # chosen here, so that its name is known afterwards
        config = replace(config, out=str(fresh_folder(OUTPUTS / config.name)))
    _quieten()
    restarts = config.launch.max_restarts
    for restart in range(restarts + 1):
        try:
            return _start(config, f"loratune-{os.getpid()}-{restart}")
        except LoratuneError as error:
            if restart == restarts or not is_lost_process(error):
                raise
            say(f"{error.cause}; restart {restart + 1} of {restarts}")
        if config.resume is None or not names_checkpoint(config.resume):
            config = replace(config, resume=AUTO)


def _start(config: RunConfig, run_id: str) -> None:
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.launch.nproc,
        rdzv_endpoint="localhost:0",
        rdzv_backend="c10d",
        run_id=run_id,
        max_restarts=0,  # torch's own restarts would repeat a user's mistake
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
        raise RuntimeError(_PREFIX + json.dumps(described(error))) from None


def _explained(error: ChildFailedError, out: str) -> LoratuneError:
    rank, failure = _cause(error)
    message = failure.message
    if isinstance(message, dict):
        message = str(message.get("message", ""))
    if _PREFIX in str(message):
        return RelayedError(json.loads(str(message).split(_PREFIX, 1)[1]))
    how = f"exit code {failure.exitcode}"
    if failure.exitcode < 0:
        how = f"signal {-failure.exitcode} ({signal.Signals(-failure.exitcode).name})"
    return LostProcessError(
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
