"""A job that submitit runs: continued after a requeue, given back after a signal."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from loratune.cli.submitit_job import continued_after_requeue
from loratune.config.schema import RunConfig

# A job as submitit runs it: handlers of its own, then the run, which is told to stop.
JOB = """
import os, signal, sys
from loratune.cli.submitit_job import give_back
from loratune.training.signals import stop_requests, stopped

def requeue(number, frame):
    if os.environ.get("REFUSES"):
        raise RuntimeError("Job not requeued because: timed-out too many times.")
    print("requeued")
    sys.exit(255)

signal.signal(signal.SIGTERM, lambda number, frame: print("bypassed"))
signal.signal(signal.SIGUSR2, requeue)
with stop_requests() as stop:
    os.kill(os.getpid(), signal.Signals[sys.argv[1]])
    print("saved after", signal.Signals(stop.received).name)
    error = stopped(stop.received, 3, "run")
try:
    give_back(error)
except type(error) as kept:
    print(kept)
"""


def job(folder: Path, name: str, state: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of a job that gets a signal while SLURM reports `state`."""
    squeue = folder / "squeue"
    squeue.write_text(f'#!/bin/sh\n[ "$3" = --jobs=41_1 ] && echo {state}\n')
    squeue.chmod(squeue.stat().st_mode | stat.S_IXUSR)
    variables = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "41",  # as the last element of an array has it
        "SLURM_ARRAY_JOB_ID": "41",
        "SLURM_ARRAY_TASK_ID": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", JOB, name],
        env=variables, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM"])
def test_a_job_that_slurm_means_to_go_on_is_requeued_once_it_is_saved(tmp_path, name):
    assert job(tmp_path, name, "RUNNING") == (255, f"saved after {name}\nrequeued\n")


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_job_that_slurm_ends_itself_only_ends(tmp_path, state):
    assert job(tmp_path, "SIGTERM", state) == (75, "saved after SIGTERM\n")


def test_a_job_that_submitit_does_not_requeue_says_why_and_how_to_go_on(tmp_path):
    code, output = job(tmp_path, "SIGUSR2", "RUNNING", REFUSES="yes")
    assert code == 0
    assert "timed-out too many times" in output and "loratune train resume=run" in output


def test_another_signal_of_submitits_is_its_own(tmp_path):
    code, output = job(tmp_path, "SIGTERM", "RUNNING", SUBMITIT_PREEMPT_SIGNAL="TERM")
    assert (code, output) == (75, "saved after SIGTERM\nbypassed\n")


def test_elsewhere_nothing_is_given_back(tmp_path):
    code, output = job(tmp_path, "SIGTERM", "RUNNING", SUBMITIT_EXECUTOR="local")
    assert (code, output) == (0, "saved after SIGTERM\n")


def test_a_signal_that_nobody_handles_stays_the_systems():
    from loratune.training.signals import stop_requests

    with stop_requests():
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


def test_a_job_started_again_continues_in_its_folder(monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert continued_after_requeue(RunConfig()).resume is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert continued_after_requeue(RunConfig()).resume == "auto"
    assert continued_after_requeue(RunConfig(resume="run")).resume == "run"
