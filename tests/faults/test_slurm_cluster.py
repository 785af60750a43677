"""A real SLURM of two nodes on this machine: sweeps, runs over both, preemption, time limits."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
from support.slurm_cluster import PATIENCE, SlurmCluster, slurm_cluster, wait_until, why_not

from faults.conftest import Bench
from faults.harness import differences, result
from faults.test_processes import free_port
from faults.verify import is_usable

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]

SBATCH = str(Path(__file__).parents[2] / "docs" / "loratune.sbatch")
LONG = ("trainer.steps=500", "trainer.save_every=20", "trainer.keep_checkpoints=2")
SUBMITIT = ("hydra/launcher=submitit_slurm", "hydra.sweep.dir=sweep")


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    # A socket's path has room for 107 characters, fewer than pytest's own folders may take.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, slurm_cluster(Path(folder)) as it:
        yield it


@pytest.fixture(scope="module")
def undisturbed(session_bench: Bench) -> Path:
    """The long run in two processes without SLURM."""
    run = session_bench.folder / "undisturbed"
    done = session_bench.start(run, *LONG, "launch.nproc=2").wait(PATIENCE)
    assert done.code == 0, done.err
    return run


def same(run: Path, other: Path) -> bool:
    """Whether two runs share adapter, newest checkpoint and metrics, byte for byte."""
    newest = max(path.name for path in (run / "checkpoints").glob("step_*"))
    first, second = (
        {
            name: value
            for name, value in result(folder).items()
            if not name.startswith("checkpoints/") or f"/{newest}/" in name
        }
        for folder in (run, other)
    )
    return not differences(first, second)


def is_under_way(run: Path) -> bool:
    """Whether a run has saved its second checkpoint."""
    return len(list((run / "checkpoints").glob("step_*"))) >= 2


def log_of(folder: Path, job: str) -> str:
    return (folder / f"loratune-{job}.log").read_text()


# -- one run over both nodes -------------------------------------------------------------------


def test_srun_makes_one_run_of_its_tasks_and_so_does_torchrun(
    cluster: SlurmCluster, bench: Bench
) -> None:
    assert bench.train("launched", "launch.nproc=2").code == 0
    words = bench.words("by_srun")
    done = cluster.run("srun", "-N2", "loratune", *words, cwd=bench.folder)
    assert done.returncode == 0, done.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=job"]
    words = bench.words("by_torchrun")
    done = cluster.run("srun", "-N2", *torchrun, "-m", "loratune", *words, cwd=bench.folder)
    assert done.returncode == 0, done.stderr
    expected = result(bench.folder / "launched")
    assert not differences(result(bench.folder / "by_srun"), expected)
    assert not differences(result(bench.folder / "by_torchrun"), expected)


def test_a_script_that_forgot_srun_is_told(cluster: SlurmCluster, bench: Bench) -> None:
    script = bench.folder / "script.sh"
    script.write_text(f"#!/bin/bash\nloratune {' '.join(bench.words('run'))}\n")
    job = cluster.submit("--ntasks=2", "--output=loratune-%j.log", str(script), cwd=bench.folder)
    cluster.wait(job)
    [line] = log_of(bench.folder, job).splitlines()
    assert line.startswith("error[2] this SLURM job has 2 tasks") and "srun" in line
    assert not (bench.folder / "run").exists()


# -- the batch script of docs/ -----------------------------------------------------------------


def started(cluster: SlurmCluster, bench: Bench, *options: str) -> str:
    """The long run by `docs/loratune.sbatch`, back when its second checkpoint is there."""
    words = bench.words("run", *LONG)[1:]  # the script itself says `train`
    job = cluster.submit(*options, SBATCH, *words, cwd=bench.folder)
    run = bench.folder / "run"
    wait_until(lambda: is_under_way(run) or not cluster.state(job), f"job {job}")
    assert is_under_way(run), log_of(bench.folder, job)
    return job


def check_continued(bench: Bench, job: str, undisturbed: Path) -> None:
    log = log_of(bench.folder, job)
    # What srun still prints while SLURM ends a job may be lost; its own lines are not.
    assert "Exited with exit code 75" in log and "resuming after step" in log, log
    assert same(bench.folder / "run", undisturbed)


def test_a_requeued_job_goes_on_to_the_same_bytes(
    cluster: SlurmCluster, bench: Bench, undisturbed: Path
) -> None:
    job = started(cluster, bench)
    cluster.ask("scontrol", "requeue", job)
    cluster.wait(job)
    check_continued(bench, job, undisturbed)


@pytest.mark.parametrize("partition", ["main", "grace"])
def test_a_preempted_job_makes_room_and_goes_on_to_the_same_bytes(
    cluster: SlurmCluster, bench: Bench, undisturbed: Path, partition: str
) -> None:
    job = started(cluster, bench, f"--partition={partition}")
    urgent = cluster.run("srun", "--partition=urgent", "-N2", "true", cwd=bench.folder)
    assert urgent.returncode == 0, urgent.stderr
    cluster.wait(job)
    check_continued(bench, job, undisturbed)


def test_a_job_whose_time_ends_goes_on_to_the_same_bytes(
    cluster: SlurmCluster, bench: Bench, undisturbed: Path
) -> None:
    # SLURM counts in minutes and looks every half: the signal comes after 60 to 90 seconds.
    steps = f"trainer.steps={int(120 / seconds_a_step(undisturbed))}"
    options = (steps, "trainer.save_every=500", "trainer.keep_checkpoints=2")
    assert bench.start("alone", *options, "launch.nproc=2").wait(PATIENCE).code == 0
    words = bench.words("run", *options)[1:]
    job = cluster.submit("--time=2", "--signal=TERM@30", SBATCH, *words, cwd=bench.folder)
    cluster.wait(job)
    check_continued(bench, job, bench.folder / "alone")


def seconds_a_step(run: Path) -> float:
    records = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
    return median(one["train/step_seconds"] for one in records if "train/step_seconds" in one)


def test_a_cancelled_job_is_saved_and_stays_cancelled(cluster: SlurmCluster, bench: Bench) -> None:
    job = started(cluster, bench)
    cluster.ask("scancel", job)
    cluster.wait(job)
    log = log_of(bench.folder, job)
    assert "Exited with exit code 75" in log and "resuming" not in log
    assert "JobState=CANCELLED" in cluster.ask("scontrol", "show", "job", job)
    assert is_usable(bench.folder / "run")


# -- sweeps through submitit -------------------------------------------------------------------


@pytest.fixture
def submitit() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra slurm is absent")


def element(cluster: SlurmCluster, number: int) -> str:
    """One job of the sweep that runs, which is an array."""
    [array] = set(cluster.ask("squeue", "-h", "-o", "%F").splitlines())
    return f"{array}_{number}"


@pytest.mark.usefixtures("submitit")
def test_a_sweep_gives_every_variant_a_job_and_the_bytes_of_a_local_run(
    cluster: SlurmCluster, bench: Bench
) -> None:
    variants = ("lora", "lora_fa", "lora_plus", "vera")
    rows = {"adapter.dropout": "0", "adapter.rank": "4"}
    common = [f"{key}={value}" for key, value in rows.items()]
    words = bench.words("", *common)
    words = [word for word in words if not word.startswith(("out=", "adapter="))]
    sweep = [*words, *SUBMITIT, "hydra.sweep.subdir=${adapter.variant}"]
    done = cluster.run("loratune", *sweep, "-m", f"adapter={','.join(variants)}", cwd=bench.folder)
    assert done.returncode == 0, done.stderr
    for variant in variants:
        alone = bench.loratune(*words, f"adapter={variant}", f"out=alone/{variant}")
        assert alone.code == 0, alone.err
        run = result(bench.folder / "sweep" / variant)
        assert run and not differences(run, result(bench.folder / "alone" / variant)), variant


@pytest.mark.usefixtures("submitit")
@pytest.mark.parametrize("nodes", [1, 2])
def test_the_jobs_of_a_sweep_go_on_after_a_requeue_and_after_submitits_own_signal(
    cluster: SlurmCluster, bench: Bench, nodes: int
) -> None:
    words = [word for word in bench.words("", *LONG) if not word.startswith("out=")]
    sweep = [*words, *SUBMITIT, f"hydra.launcher.nodes={nodes}", "hydra.sweep.subdir=${name}"]
    waiting = cluster.start_command("loratune", *sweep, "-m", "name=a,b", cwd=bench.folder)
    disturb = {
        "a": lambda job: cluster.ask("scontrol", "requeue", job),
        "b": lambda job: cluster.ask("scancel", "--signal=USR2", job),
    }
    for number, (name, disturbed) in enumerate(disturb.items()):
        run = bench.folder / "sweep" / name
        wait_until(lambda run=run: is_under_way(run) or waiting.poll() is not None, name)
        disturbed(element(cluster, number))
    output, _ = waiting.communicate(timeout=PATIENCE)
    assert waiting.returncode == 0, output
    logs = [path.read_text() for path in bench.folder.glob("sweep/.submitit/*/*_0_log.out")]
    assert len(logs) == 2 and all("resuming after step" in log for log in logs)
    for name in disturb:
        alone = bench.folder / "alone" / name
        words = (*LONG, f"name={name}", f"launch.nproc={nodes}")
        done = bench.start(alone, *words).wait(PATIENCE)
        assert done.code == 0, done.err
        assert same(bench.folder / "sweep" / name, alone)
