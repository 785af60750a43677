"""A job of a sweep under SLURM: started again after a requeue, and given back after a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

from loratune.config.schema import RunConfig
from loratune.errors import Preempted
from loratune.runs.run_dir import AUTO

_ANSWER_WITHIN = 60.0
"""Seconds for the scheduler to say what it does with the job."""


def continued_after_requeue(config: RunConfig) -> RunConfig:
    """The recipe of a job that SLURM starts again: what lies in its folder is its own.

    A ``resume`` that the user set stands.
    """
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return replace(config, resume=AUTO) if requeued and config.resume is None else config


def give_back(error: Preempted) -> None:
    """After a save, end so that SLURM starts the job again, where Hydra's launcher is submitit.

    submitit's handler of its own signal requeues a job, and ends the process.  It was not asked
    for SIGTERM, which may be the first word of a preemption that is a requeue only if the job
    lasts until the last one.  A job that SLURM has ended already (requeued or cancelled) only
    ends, without a result, so that the sweep goes on waiting for it.

    Raises:
        Preempted: if submitit does not requeue the job, with its reason.
        SystemExit: in every other job of submitit's.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return
    number = signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]
    handler = signal.getsignal(number)
    if callable(handler) and _is_running():
        try:
            handler(number, None)
        except Exception as refusal:
            error.where = "; ".join(filter(None, (error.where, str(refusal).rstrip("."))))
            raise error from None
    sys.exit(error.exit_code)


def _is_running() -> bool:
    """Whether SLURM means this job to go on."""
    words = ["squeue", "--noheader", "--format=%T", f"--jobs={_job_number()}"]
    try:
        answer = subprocess.run(
            words, capture_output=True, text=True, timeout=_ANSWER_WITHIN, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.stdout.strip() == "RUNNING"


def _job_number() -> str:
    """An element of an array by both its numbers: the last one's own means the whole array."""
    element = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return "_".join(filter(None, element)) or os.environ.get("SLURM_JOB_ID", "")
