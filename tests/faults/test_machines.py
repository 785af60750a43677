"""One run on two machines under torchrun: killed, cut off, stopped; to the same bytes.

The machines are network namespaces (`support/machines.py`) that share a disk.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.machines import Agent, Machines, two_machines, why_not

from faults.conftest import Bench
from faults.harness import differences, result
from faults.verify import is_usable, verified_steps

REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it an agent that joins later waits for an address that torch 2.13 does not tell it."""
OPTIONS = ("--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-conf", "join_timeout=60")
TIMEOUT = 10


class Cluster:
    """A run of 200 steps on both machines, saved every 20."""

    def __init__(self, bench: Bench, machines: Machines) -> None:
        self.bench, self.machines = bench, machines

    def words(self, run: Path, *more: str) -> list[str]:
        return self.bench.words(
            run, "resume=auto", "trainer.steps=200", "trainer.save_every=20",
            "trainer.keep_checkpoints=3", f"launch.timeout={TIMEOUT}", *more,
        )  # fmt: skip

    def agent(self, number: int, run: Path, *more: str, options: tuple[str, ...] = ()) -> Agent:
        words = self.words(run, *more)
        return self.machines.torchrun(number, [*OPTIONS, *options], words, **FRESH_STORE)

    def both(self, run: Path, *more: str, options: tuple[str, ...] = ()) -> list[Agent]:
        return [self.agent(number, run, *more, options=options) for number in (1, 2)]

    def disturbed_when_saved(self, run: Path) -> None:
        """Wait until the run has something to lose."""
        self.machines.wait_until((run / "checkpoints/step_000060/manifest.json").exists)


@pytest.fixture
def cluster(bench: Bench) -> Iterator[Cluster]:
    with two_machines(bench.folder) as machines:
        yield Cluster(bench, machines)


@pytest.fixture(scope="module")
def undisturbed(session_bench: Bench) -> dict[str, str]:
    with two_machines(session_bench.folder) as machines:
        cluster, run = Cluster(session_bench, machines), session_bench.folder / "machines"
        agents = cluster.both(run)
        assert [agent.wait() for agent in agents] == [0, 0], agents[0].text
        assert agents[1].text.count("error[") == 0
    return result(run)


def check_same(run: Path, undisturbed: dict[str, str], agents: list[Agent]) -> None:
    assert [agent.wait() for agent in agents] == [0] * len(agents), [a.text for a in agents]
    assert not differences(result(run), undisturbed)


def test_a_killed_process_is_started_again(cluster: Cluster, undisturbed: dict[str, str]) -> None:
    run = cluster.bench.folder / "run"
    agents = cluster.both(run)
    cluster.disturbed_when_saved(run)
    os.kill(agents[1].workers()[-1], signal.SIGKILL)
    check_same(run, undisturbed, agents)
    assert "resuming after step" in agents[0].text


@pytest.mark.parametrize("number", [1, 2])
def test_an_agent_that_is_killed_and_started_again_goes_on(
    cluster: Cluster, undisturbed: dict[str, str], number: int
) -> None:
    """Its processes save and end with it; the other machine waits for it, or needs a start too."""
    run = cluster.bench.folder / "run"
    agents = cluster.both(run)
    cluster.disturbed_when_saved(run)
    left = agents[number - 1].workers()
    agents[number - 1].kill()
    wait_for_end(left)
    if number == 1:  # it held the meeting place: without it the other agent ends
        assert agents[1].wait() == 1
        agents = cluster.both(run)
    else:
        agents[1] = cluster.agent(2, run)
    check_same(run, undisturbed, agents)
    assert "resuming after step" in agents[0].text


def wait_for_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "processes outlive their agent"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_run_may_go_on_with_the_machine_that_is_left(
    cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    run = cluster.bench.folder / "run"
    elastic = ("--nnodes", "1:2", "--rdzv-conf", "join_timeout=60,last_call_timeout=5")
    agents = cluster.both(run, "allow_drift=[processes]", options=elastic)
    cluster.disturbed_when_saved(run)
    agents[1].kill()
    assert agents[0].wait() == 0, agents[0].text
    assert "drift allowed: processes: 2 → 1" in agents[0].text
    assert verified_steps(run)[-1] == 200


def test_a_network_that_is_cut_ends_every_process_in_one_line(cluster: Cluster) -> None:
    """The agents wait for each other no longer than torchrun's join_timeout and TCP allow."""
    cluster.machines.give_up_sooner()
    run = cluster.bench.folder / "run"
    agents = cluster.both(run)
    cluster.disturbed_when_saved(run)
    cluster.machines.cut()
    for other, agent in zip((1, 0), agents, strict=True):
        assert agent.wait() == 1
        line = f"error[5] rank {other} did not answer for {TIMEOUT} s; rank {1 - other}"
        assert agent.text.count(line) == 1, agent.text
    assert is_usable(run)


def test_a_short_break_of_the_network_is_waited_for(
    cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    run = cluster.bench.folder / "run"
    agents = cluster.both(run)
    cluster.disturbed_when_saved(run)
    cluster.machines.cut()
    time.sleep(TIMEOUT / 4)
    cluster.machines.mend()
    check_same(run, undisturbed, agents)
    assert "resuming" not in agents[0].text


@pytest.mark.parametrize("seconds", [TIMEOUT / 3, 6 * TIMEOUT])
def test_a_slow_process_is_waited_for_and_a_stopped_one_replaced(
    cluster: Cluster, undisturbed: dict[str, str], seconds: float
) -> None:
    run = cluster.bench.folder / "run"
    agents = cluster.both(run)
    cluster.disturbed_when_saved(run)
    slow = agents[1].workers()[-1]
    os.kill(slow, signal.SIGSTOP)
    if seconds < TIMEOUT:
        time.sleep(seconds)
        os.kill(slow, signal.SIGCONT)
    check_same(run, undisturbed, agents)
    is_lost = "rank 1 did not answer" in agents[0].text
    assert is_lost == (seconds > TIMEOUT)


def test_folders_that_are_not_shared_are_named_by_both(cluster: Cluster) -> None:
    """A relative folder on each machine's own disk."""
    for number in (1, 2):
        (cluster.bench.folder / f"disk{number}").mkdir()
    here = cluster.machines.folder
    agents = []
    for number in (1, 2):
        cluster.machines.folder = here / f"disk{number}"
        agents.append(cluster.agent(number, Path("run"), options=("--max-restarts", "0")))
    said = "rank 1 on loratune2 cannot see what rank 0 on loratune1 wrote"
    assert [agent.wait() for agent in agents] == [1, 1]
    assert sum(agent.text.count(f"error[8] {said}") for agent in agents) >= 1
    assert not any((here / f"disk{number}" / "run").exists() for number in (1, 2))


def test_a_clock_that_differs_is_named(cluster: Cluster) -> None:
    if (faked := shutil.which("faketime")) is None:
        pytest.skip("faketime is not installed")
    run = cluster.bench.folder / "run"
    words = cluster.words(run)
    static = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "loratune1"]
    agents = [
        cluster.machines.start(
            number, [*before, *cluster.machines.python, *static, "--node-rank", str(number - 1),
            "-m", "loratune", *words],
        )
        for number, before in ((1, []), (2, [faked, "-f", "-1h"]))
    ]  # fmt: skip
    assert [agent.wait() for agent in agents] == [1, 1]
    told = [agent.text.count("error[2] the clock of rank 1 is 3600 s behind") for agent in agents]
    assert sum(told) >= 1 and not run.exists(), [agent.text for agent in agents]
