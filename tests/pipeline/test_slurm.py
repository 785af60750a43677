"""What SLURM's variables make of a process: one of several, the only one, or a question."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from loratune.errors import ConfigError
from loratune.pipeline.slurm import FIRST_PORT, PORTS, rank_variables

# What `srun -N2` sets in its second task (SLURM 22.05), the names that matter.
TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_NUM_TASKS": "2",
}
# What the script of `sbatch --ntasks=2` has: it is not a task of a step.
SCRIPT = {name: TASK[name] for name in TASK if "STEP" not in name} | {"SLURM_PROCID": "0"}


def refused(environment: Mapping[str, str], nproc: int = 1) -> str:
    with pytest.raises(ConfigError) as error:
        rank_variables(environment, nproc)
    [line] = error.value.lines()
    return line


def test_a_task_of_a_step_is_one_process_of_the_run():
    assert rank_variables(TASK, 1) == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "node07",
        "MASTER_PORT": str(FIRST_PORT + 4711),
    }


def test_a_process_outside_slurm_is_alone():
    assert rank_variables({}, 1) == {}
    assert rank_variables({}, 4) == {}


def test_the_only_task_of_a_step_is_alone_whatever_the_job_has():
    assert rank_variables({**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 1) == {}
    assert rank_variables({**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 4) == {}


def test_torchruns_own_variables_stand():
    assert rank_variables({**TASK, "RANK": "3", "WORLD_SIZE": "8"}, 1) == {}


def test_a_meeting_place_that_is_set_stands():
    chosen = {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "29500"}
    assert rank_variables({**TASK, **chosen}, 1).items() >= chosen.items()


def test_a_recorded_number_of_processes_may_stand_in_the_recipe():
    assert rank_variables(TASK, 2)["WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[1-4]", "node1"),
        ("node[007-009,12],big1", "node007"),
        ("node[3,1]", "node3"),
        ("rack[1-2]n[05-06]", "rack1n05"),
        ("gpu-a100[01-02].cluster.org", "gpu-a10001.cluster.org"),
        ("10.0.0.[8-9]", "10.0.0.8"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str):
    assert rank_variables({**TASK, "SLURM_STEP_NODELIST": hosts}, 1)["MASTER_ADDR"] == first
    whole_job = {name: TASK[name] for name in TASK if name != "SLURM_STEP_NODELIST"}
    whole_job["SLURM_JOB_NODELIST"] = hosts
    assert rank_variables(whole_job, 1)["MASTER_ADDR"] == first


def test_steps_and_jobs_that_run_together_meet_at_ports_of_their_own():
    ports = {
        int(
            rank_variables({**TASK, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}, 1)[
                "MASTER_PORT"
            ]
        )
        for job in range(9_990, 10_090)
        for step in range(10)
    }
    assert len(ports) == 100 * 10
    assert min(ports) >= FIRST_PORT and max(ports) < FIRST_PORT + PORTS


@pytest.mark.parametrize(
    ("devices", "local"), [("", "1"), ("0,1,2,3", "1"), ("0", "0"), ("GPU-8f2c", "0")]
)
def test_a_task_that_sees_one_device_uses_that(devices: str, local: str):
    environment = {**TASK, "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": devices}
    assert rank_variables(environment, 1)["LOCAL_RANK"] == local


def test_launch_nproc_in_every_task_is_refused():
    line = refused(TASK, nproc=4)
    assert line.startswith("error[2] srun started 2 tasks, and each would start 4 processes")
    assert "launch.nproc=4" in line


def test_one_process_in_a_script_of_several_tasks_is_refused():
    line = refused(SCRIPT)
    assert line.startswith("error[2] this SLURM job has 2 tasks")
    assert "SLURM_NTASKS=2" in line and "srun" in line


def test_a_script_may_start_its_own_processes_and_a_shell_on_no_node_anything():
    assert rank_variables(SCRIPT, 2) == {}
    salloc = {name: SCRIPT[name] for name in SCRIPT if name != "SLURM_PROCID"}
    assert rank_variables(salloc, 1) == {}
    assert rank_variables({**SCRIPT, "SLURM_NTASKS": "1"}, 1) == {}


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("SLURM_PROCID", None, "SLURM has not set it"),
        ("SLURM_PROCID", "one", "'one' is not a number"),
        ("SLURM_STEP_NUM_TASKS", "²", "'²' is not a number"),
        ("SLURM_JOB_ID", None, "SLURM has not set it"),
        ("SLURM_STEP_NODELIST", ",", "does not say on which machines"),
    ],
)
def test_variables_that_say_nothing_are_named(name: str, value: str | None, cause: str):
    environment = {key: TASK[key] for key in TASK if key != name}
    line = refused(environment if value is None else {**environment, name: value})
    assert cause in line and name.removeprefix("SLURM_STEP_") in line


def test_the_command_line_asks(cli):
    """`loratune train` in a script of two tasks stops before anything is loaded or written."""
    line = cli.refuses("train", "recipe=smoke", "out=run", environment=SCRIPT)
    assert line.startswith("error[2] this SLURM job has 2 tasks")
