"""Several processes on this machine, through torch's own elastic launcher."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.errors import record as record_error
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from loratune.config.convert import from_plain, to_plain
from loratune.config.schema import RunConfig
from loratune.errors import CheckpointError, LoratuneError, TrainingError


def is_launched() -> bool:
    """Whether torchrun or a cluster started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(config: RunConfig) -> None:
    """Start ``launch.nproc`` processes of one run and wait for them.

    When one dies, torch ends the others.

    Raises:
        LoratuneError: what stopped a process, or which process died of what.
    """
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
        raise _explained(error) from None


@record_error
def worker(values: dict[str, Any]) -> None:
    """One process of the run (also what ``torchrun -m loratune`` runs in each)."""
    from loratune import pipeline

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend)
    try:
        pipeline.run(from_plain(values, RunConfig))
    except LoratuneError as error:
        raise RuntimeError(_PREFIX + json.dumps(_described(error))) from None
    finally:
        dist.destroy_process_group()


_PREFIX = "loratune: "


def _described(error: LoratuneError) -> dict[str, Any]:
    return {**error.as_dict(), "kind": type(error).__name__}


def _explained(error: ChildFailedError) -> LoratuneError:
    rank, failure = error.get_first_failure()
    message = failure.message
    if isinstance(message, dict):
        message = str(message.get("message", ""))
    if _PREFIX in str(message):
        details = json.loads(str(message).split(_PREFIX, 1)[1])
        kinds = {cls.__name__: cls for cls in LoratuneError.__subclasses__()}
        kind = kinds.get(details["kind"], CheckpointError)
        return kind(details["cause"], where=details["where"], fix=details["fix"])
    how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    return TrainingError(
        f"process {rank} (pid {failure.pid}) died of {how}; all others were ended",
        where=str(message).splitlines()[0] if message and failure.exitcode >= 0 else "launch.nproc",
        fix="the checkpoints are intact: continue with resume=DIR",
    )
