"""Two processes (gloo): resumed, killed, signalled, disagreeing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.command_line import Case, Outcome

from faults.conftest import Bench, write_rows
from faults.harness import differences, result
from faults.tally import TALLY
from faults.test_resume import cut
from faults.verify import check_recovered, check_told, is_usable, verified_steps

STEP = "loratune.training.loop.train_step"


@dataclass(frozen=True)
class Rank:
    """What one process of several has for itself."""

    words: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    cwd: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rank_environment() -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}


def start_ranks(bench: Bench, out: Path, *words: str, faults: tuple[str, ...] = ()) -> list[Case]:
    """Two processes as torchrun would start them."""
    shared = rank_environment()
    return [
        bench.start(
            out, *words, faults=faults,
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]  # fmt: skip


def start_unlike(bench: Bench, out: Path | str, per_rank: list[Rank], *words: str) -> list[Case]:
    """Processes of which each has words, faults or a folder of its own."""
    shared = rank_environment() | {"WORLD_SIZE": str(len(per_rank))}
    return [
        bench.start(
            out, *words, *one.words, faults=one.faults, cwd=one.cwd or bench.folder,
            environment={**shared, **one.environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, one in enumerate(per_rank)
    ]  # fmt: skip


def run_ranks(bench: Bench, out: Path, *words: str, faults: tuple[str, ...] = ()) -> list[Outcome]:
    return [case.wait() for case in start_ranks(bench, out, *words, faults=faults)]


def run_both(bench: Bench, out: Path, *words: str) -> list[Outcome]:
    outcomes = run_ranks(bench, out, *words)
    assert [outcome.code for outcome in outcomes] == [0, 0], [o.err for o in outcomes]
    return outcomes


@pytest.fixture(scope="module")
def whole(session_bench: Bench) -> Path:
    run = session_bench.folder / "two-processes"
    run_both(session_bench, run)
    return run


def test_two_processes_resume_to_the_same_bytes(bench: Bench, whole: Path) -> None:
    for step in (3, 6, 9):  # within, and across the epochs of four steps
        run = cut(whole, bench.folder / f"from{step}", step)
        first, _ = run_both(bench, run, "resume=auto")
        check_recovered(run, first, result(whole))
        TALLY.add("resumes compared byte for byte")


def test_two_processes_agree_with_one_to_rounding(bench: Bench) -> None:
    from safetensors.torch import load_file

    run_both(bench, bench.folder / "two", "adapter.dropout=0")
    assert bench.train("one", "adapter.dropout=0").code == 0
    one, two = (
        load_file(bench.folder / name / "adapter" / "adapter_model.safetensors")
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).abs().max() < 1e-5, name
    losses = [
        [
            json.loads(line)["train/loss"]
            for line in (bench.folder / n / "metrics.jsonl").read_text().splitlines()
        ]
        for n in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_adapter_of_two_processes_is_complete(bench: Bench, whole: Path) -> None:
    from safetensors.torch import load_file

    assert bench.train("one").code == 0
    one = load_file(bench.folder / "one" / "adapter" / "adapter_model.safetensors")
    two = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in one.items()} == {
        name: tensor.shape for name, tensor in two.items()
    }
    assert all(tensor.numel() and bool(tensor.any()) for tensor in two.values())


def test_processes_that_disagree_are_stopped_before_anything_is_published(bench: Bench) -> None:
    run = bench.folder / "run"
    outcomes = run_ranks(bench, run, faults=(f"nudge@{STEP}:2#1",))
    assert [outcome.code for outcome in outcomes] == [5, 5]
    check_told(outcomes[0], 5, "different adapters", "step 3")
    assert verified_steps(run) == []


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("data", "data.path=other.jsonl"),
        ("test", "data.test_path=other.jsonl"),
        ("base", "model.path=base2"),
        ("base", "model.path=base2 launch.shard=true"),
        ("trainer.lr", "trainer.lr=0.003"),
        ("evaluate.batch_size", "evaluate.batch_size=3"),
    ],
)
def test_ranks_that_are_given_different_things_stop_before_the_first_step(
    bench: Bench, key: str, word: str
) -> None:
    word, *both = word.split()
    write_rows(bench.folder / "other.jsonl", range(1, 17))
    bench.copy("base2")
    run, shared = bench.folder / "run", rank_environment()
    cases = [
        bench.start(
            run,
            "stages=[train,evaluate]",
            *words,
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, words in enumerate([both, [*both, word]])
    ]
    for outcome in [case.wait() for case in cases]:
        check_told(outcome, 2, "rank 1 differs from rank 0", f"{key}:", "→")
    assert not run.exists()


def check_all_told(cases: list[Case], code: int, *words: str) -> None:
    """Every process ends with that code, in one line that holds these words."""
    for outcome in [case.wait() for case in cases]:
        check_told(outcome, code, *words)
        assert len(outcome.errors) == 1, outcome.err


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("old@loratune.runs.provenance.version:1", ("rank 1 differs", "versions.loratune:")),
        ("late@time.time:1+", ("the clock of rank 1 is 3600 s behind rank 0's",)),
    ],
)
def test_a_process_of_another_version_or_clock_is_named_by_all(
    bench: Bench, fault: str, words: tuple[str, ...]
) -> None:
    run = bench.folder / "run"
    check_all_told(start_unlike(bench, run, [Rank(), Rank(faults=(fault,))]), 2, *words)
    assert not run.exists()


def test_a_folder_that_is_not_shared_is_named_by_all(bench: Bench) -> None:
    """The same relative folder on two machines, each with a disk of its own."""
    disks = [bench.folder / "disk0", bench.folder / "disk1"]
    for disk in disks:
        disk.mkdir()
    cases = start_unlike(bench, "run", [Rank(cwd=disk) for disk in disks])
    check_all_told(cases, 8, "rank 1 on ", "cannot see what rank 0 on ", "out must name a folder")
    assert [list(disk.iterdir()) for disk in disks] == [[], []]


def test_more_processes_than_rows_are_refused_by_rank(bench: Bench) -> None:
    write_rows(bench.folder / "two.jsonl", range(2))
    run, words = bench.folder / "run", ("data.path=two.jsonl", "trainer.batch_size=4")
    cases = start_unlike(bench, run, [Rank()] * 3, *words)
    check_all_told(cases, 2, "3 processes share 2 training rows: rank 2 would have none")
    assert not run.exists()


def test_what_one_process_cannot_use_is_told_by_all_with_its_rank_and_code(bench: Bench) -> None:
    bad = bench.folder / "bad.jsonl"
    bad.write_text('{"prompt": "q", "completion": "a"}\n{"prompt": "q"\n')
    run = bench.folder / "run"
    cases = start_unlike(bench, run, [Rank(), Rank((f"data.path={bad}",))])
    check_all_told(cases, 3, "bad.jsonl:2", "rank 1")
    assert not run.exists()


def test_a_port_in_use_is_named(bench: Bench) -> None:
    run = bench.folder / "run"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = {"MASTER_PORT": str(listener.getsockname()[1])}
        cases = start_unlike(bench, run, [Rank(environment=port)] * 2)
        first, second = [case.wait() for case in cases]
    check_told(first, 2, "rank 0 cannot listen on 127.0.0.1:", "the port is in use")
    check_told(second, 2, "rank 1: what answers at", "is not this run, the port is in use")
    assert not run.exists()


def test_what_torchrun_may_restart_must_be_resumable(bench: Bench) -> None:
    outcome = bench.train(
        "run",
        environment={**rank_environment(), "RANK": "0", "TORCHELASTIC_MAX_RESTARTS": "3"},
    )
    check_told(outcome, 2, "--max-restarts 3", "add out=DIR resume=auto")


def test_a_process_that_hangs_is_named_and_the_run_ends(bench: Bench) -> None:
    run = bench.folder / "run"
    cases = start_ranks(bench, run, "launch.timeout=8", "trainer.steps=100000")
    cases[0].wait_until(run / "checkpoints/step_000003/manifest.json")
    cases[1].signal(signal.SIGSTOP)
    outcome = cases[0].wait()
    cases[1].signal(signal.SIGKILL)
    check_told(outcome, 5, "rank 1 did not answer for 8 s", "launch.timeout", "resume=auto")
    assert is_usable(run)


def test_another_number_of_processes_is_drift(bench: Bench, whole: Path) -> None:
    run = cut(whole, bench.folder / "run", 6)
    check_told(bench.train(run, "resume=auto"), 6, "processes: 2 → 1", "allow_drift=[processes]")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_takes_the_same_rows_in_the_same_order(
    bench: Bench, before: int, after: int
) -> None:
    """One key allows it; the result is that of the first number of processes, to rounding."""
    from safetensors.torch import load_file

    def start(run: Path, number: int, *words: str) -> None:
        cases = start_unlike(bench, run, [Rank()] * number, "adapter.dropout=0", *words)
        assert [case.wait().code for case in cases] == [0] * number, cases[0].wait().err

    start(bench.folder / "whole", before)
    run = cut(bench.folder / "whole", bench.folder / "run", 6)
    start(run, after, "resume=auto", "allow_drift=[processes]")
    one, two = (
        load_file(bench.folder / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "run")
    )
    for name in one:
        assert (one[name] - two[name]).abs().max() < 1e-5, name
    lines = [
        [
            json.loads(line)
            for line in (bench.folder / name / "metrics.jsonl").read_text().split("\n")[:-1]
        ]
        for name in ("whole", "run")
    ]
    assert [x["train/tokens"] for x in lines[0]] == [x["train/tokens"] for x in lines[1]]
    losses = [[x["train/loss"] for x in part] for part in lines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    manifest = json.loads((run / "checkpoints/step_000009/manifest.json").read_text())
    assert (manifest["processes"], manifest["drift"]) == (after, [f"processes: {before} → {after}"])


def test_rank_0_killed_inside_a_save_ends_the_other_and_loses_nothing(
    bench: Bench, whole: Path
) -> None:
    for number in (2, 4):
        run = bench.folder / f"run{number}"
        killed, other = run_ranks(
            bench, run, faults=(f"kill@safetensors.torch.save_file:{number}#0",)
        )
        TALLY.add("kills at a write boundary")
        assert killed.code == -signal.SIGKILL
        check_told(other, 5, "another process of this run has ended")
        assert is_usable(run)
        first, _ = run_both(bench, run, "resume=auto")
        check_recovered(run, first, result(whole))


def test_both_ranks_stop_at_the_same_step_when_one_is_told_to(bench: Bench, whole: Path) -> None:
    run = bench.folder / "run"
    for outcome in run_ranks(bench, run, faults=(f"term@{STEP}:5#1",)):
        check_told(outcome, 75, "step 5")
    TALLY.add("SIGTERM and SIGINT")
    run_both(bench, run, "resume=auto")
    extra = set(result(run)) - set(result(whole))
    assert all("step_000005" in name for name in extra)
    kept = {name: value for name, value in result(run).items() if name not in extra}
    assert not differences(kept, result(whole))


# -- the launcher itself -----------------------------------------------------------------------


def workers_of(launcher: int) -> list[int]:
    """Process ids of the launcher's two training processes, in order of rank."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == launcher and b"spawn_main" in command:
            found.append((environment, int(folder.name)))
    return sorted(pid for _, pid in found)


def launched(bench: Bench, run: Path, *words: str) -> Case:
    """`launch.nproc=2` in its own process; back when the second checkpoint is there."""
    case = bench.start(
        run, "launch.nproc=2", "trainer.steps=4000", "trainer.keep_checkpoints=2", *words
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not case.ended:
        if len(list((run / "checkpoints").glob("step_*"))) >= 2:
            break
        time.sleep(0.02)
    return case


def test_a_killed_rank_ends_all_in_time_and_is_named(bench: Bench) -> None:
    run = bench.folder / "run"
    case = launched(bench, run)
    victim = workers_of(case.pid)[-1]
    os.kill(victim, signal.SIGKILL)
    outcome = case.wait()
    check_told(outcome, 5, "process 1", f"pid {victim}", "SIGKILL", f"resume={run}")
    assert is_usable(run)
    assert workers_of(case.pid) == []


@pytest.mark.slow
def test_a_killed_rank_is_started_again_to_the_same_bytes(bench: Bench) -> None:
    words = ("launch.max_restarts=2", "trainer.steps=60")
    assert bench.train("whole", "launch.nproc=2", *words).code == 0
    run = bench.folder / "run"
    case = bench.start(run, "launch.nproc=2", *words)
    case.wait_until(run / "checkpoints/step_000006/manifest.json")
    os.kill(workers_of(case.pid)[-1], signal.SIGKILL)
    outcome = case.wait()
    check_recovered(run, outcome, result(bench.folder / "whole"))
    assert "died of signal 9 (SIGKILL)" in outcome.text and "restart 1 of 2" in outcome.text
    assert "resuming after step" in outcome.text


@pytest.mark.slow
def test_what_a_process_says_itself_is_not_tried_again(bench: Bench) -> None:
    words = ("launch.nproc=2", "launch.max_restarts=3", "data.path=nowhere.jsonl")
    outcome = bench.train("run", *words)
    check_told(outcome, 3, "nowhere.jsonl")
    assert "restart" not in outcome.text and len(outcome.errors) == 1


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 75, id="SIGTERM"),
        pytest.param(signal.SIGINT, 130, id="SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_launcher_saves_and_says_how_to_go_on(
    bench: Bench, number: int, code: int
) -> None:
    run = bench.folder / "run"
    case = launched(bench, run)
    os.killpg(case.pid, number)  # a terminal and a scheduler tell the whole group
    check_told(case.wait(), code, f"resume={run}", "saved")
    TALLY.add("SIGTERM and SIGINT")
    assert is_usable(run)
    steps = max(
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()
    )
    assert verified_steps(run)[-1] == steps


@pytest.mark.slow
def test_what_stops_a_worker_is_told_once_with_its_code(bench: Bench) -> None:
    rows = bench.folder / "bad.jsonl"
    rows.write_text('{"prompt": "q", "completion": "a"}\n{"prompt": "q"\n')
    outcome = bench.train("run", "launch.nproc=2", f"data.path={rows}")
    check_told(outcome, 3, "bad.jsonl:2")
    assert outcome.err.count("error[3]") == 1, outcome.err


@pytest.mark.slow
def test_torchrun_starts_a_run_too(bench: Bench) -> None:
    run = bench.folder / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "loratune", *bench.words(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert verified_steps(run) == [3, 6, 9, 12]
    assert json.loads((run / "checkpoints/step_000003/manifest.json").read_text())["processes"] == 2
