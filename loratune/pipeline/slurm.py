"""Which process of a run this one is, where ``srun`` started several of them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratune.errors import ConfigError

FIRST_PORT = 12_000
PORTS = 18_000
"""Ports 12000 to 29999: above most services, below those that Linux hands out by itself."""
_STEPS = 997
"""Steps of one job lie this many ports apart, and jobs one; no two that run together meet."""
_ONE_HOST = re.compile(r"(?:[^,\[]|\[[^\]]*\])+")
_RANGES = re.compile(r"\[(\w+)[^\]]*\]")


def rank_variables(environment: Mapping[str, str], nproc: int) -> dict[str, str]:
    """What torchrun would have set for this task of a SLURM step; empty if it is the only one.

    The processes meet on the step's first host, at a port that follows from the job's number;
    ``MASTER_ADDR`` and ``MASTER_PORT`` replace either.

    Args:
        environment: the variables of this process.  Those of another launcher (``RANK``) stand.
        nproc: ``launch.nproc``, which is one of several counts that must agree.

    Raises:
        ConfigError: if it is not clear what is to be one process of which run.
    """
    if "RANK" in environment:
        return {}
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", default=0)
    if tasks == 0:
        _check_all_tasks_are_used(environment, nproc)
    if tasks <= 1:
        return {}
    if nproc not in (1, tasks):
        raise ConfigError(
            f"srun started {tasks} tasks, and each would start {nproc} processes",
            where=f"launch.nproc={nproc}",
            fix="leave launch.nproc out: every task is one process of the run",
        )
    meeting = {"MASTER_ADDR": _first_host(environment), "MASTER_PORT": str(_port(environment))}
    return {
        "RANK": str(_number(environment, "SLURM_PROCID")),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": str(_local_rank(environment)),
        **{name: environment.get(name, value) for name, value in meeting.items()},
    }


def _check_all_tasks_are_used(environment: Mapping[str, str], nproc: int) -> None:
    """Stop if a batch script has several tasks and starts loratune in one of them."""
    tasks = _number(environment, "SLURM_NTASKS", default=1)
    if tasks > 1 and nproc == 1 and "SLURM_PROCID" in environment:
        raise ConfigError(
            f"this SLURM job has {tasks} tasks, and loratune was started in one of them",
            where=f"SLURM_NTASKS={tasks}",
            fix="put srun before it for one run of all tasks, or srun --ntasks=1 for one process",
        )


def _first_host(environment: Mapping[str, str]) -> str:
    """``rack1n07`` of ``rack[1-2]n[07-09,12],other``: where rank 0 runs."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    first = _ONE_HOST.match(hosts)
    if first is None:
        raise ConfigError(
            "SLURM does not say on which machines this job runs",
            where="SLURM_JOB_NODELIST",
            fix="set MASTER_ADDR to the first one's name",
        )
    return _RANGES.sub(r"\1", first[0])


def _port(environment: Mapping[str, str]) -> int:
    job = _number(environment, "SLURM_JOB_ID")
    return FIRST_PORT + (job + _STEPS * _number(environment, "SLURM_STEP_ID", default=0)) % PORTS


def _local_rank(environment: Mapping[str, str]) -> int:
    """Which of the devices that it sees is this task's: its own, or the only one."""
    devices = environment.get("CUDA_VISIBLE_DEVICES", "")
    return 0 if devices and "," not in devices else _number(environment, "SLURM_LOCALID")


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isascii() or not text.isdigit():
        raise ConfigError(
            f"'{text}' is not a number" if text is not None else "SLURM has not set it",
            where=name,
            fix="start loratune with srun, or with torchrun",
        )
    return int(text)
