"""SIGKILL at every write, at random, in a chain, and during a merge."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from faults.conftest import Bench
from faults.harness import differences, in_parallel, result, tree
from faults.tally import TALLY
from faults.verify import check_killed, check_recovered

SHORT = ("trainer.steps=4", "trainer.save_every=2", "trainer.keep_checkpoints=1")
MERGED = (*SHORT, "stages=[train,evaluate,merge]", "trainer.eval_every=2")


@pytest.fixture(scope="module")
def short(session_bench: Bench) -> tuple[dict[str, str], list[str]]:
    """The undisturbed short run, and the writes it makes, in order."""
    outcome = session_bench.train("short", *MERGED, faults=["count@write"])
    assert outcome.code == 0, outcome.err
    return result(session_bench.folder / "short"), outcome.calls


@pytest.fixture(scope="module")
def undisturbed(session_bench: Bench) -> dict[str, str]:
    """The 12-step run."""
    outcome = session_bench.train("undisturbed")
    assert outcome.code == 0, outcome.err
    return result(session_bench.folder / "undisturbed")


def kill_at_writes(bench: Bench, short: tuple[dict[str, str], list[str]], numbers: range) -> None:
    """Kill a run at each of these writes, each followed by a start that must finish."""
    expected, writes = short

    def kill_and_resume(number: int) -> None:
        run = bench.folder / f"run{number}"
        # A file half written is worse than none: tear every tensor file, kill before the rest.
        action = "tear" if writes[number - 1].endswith("save_file") else "kill"
        killed = bench.train(run, *MERGED, faults=[f"{action}@write:{number}"])
        assert killed.code == -signal.SIGKILL, killed.err
        TALLY.add("kills at a write boundary")
        check_killed(run, save_every=2)
        check_recovered(run, bench.train(run, *MERGED, "resume=auto"), expected)
        shutil.rmtree(run)

    in_parallel(kill_and_resume, numbers)


def test_a_run_killed_at_every_eighth_write_goes_on_to_the_same_bytes(
    bench: Bench, short: tuple[dict[str, str], list[str]]
) -> None:
    assert len(short[1]) > 60
    kill_at_writes(bench, short, range(2, len(short[1]) + 1, 8))


@pytest.mark.slow
def test_a_run_killed_at_any_write_goes_on_to_the_same_bytes(
    bench: Bench, short: tuple[dict[str, str], list[str]]
) -> None:
    kill_at_writes(bench, short, range(1, len(short[1]) + 1))


def kill_at_random(bench: Bench, undisturbed: dict[str, str], kills: int, seed: int) -> None:
    """Kill `kills` starts at random instants, each followed by a start that must finish."""
    draw = random.Random(seed)
    moments = [draw.random() for _ in range(kills)]

    def kill_and_resume(item: tuple[int, float]) -> None:
        number, moment = item
        run = bench.folder / f"run{number}"
        case = bench.start(run)
        case.wait_until(run / "recipe.yaml")  # from here on there is something to lose
        time.sleep(moment * 0.25)
        case.signal(signal.SIGKILL)
        ended = case.wait()
        if ended.code == 0:
            return  # it was quicker
        assert ended.code == -signal.SIGKILL, ended.err
        TALLY.add("kills at a random instant")
        check_killed(run, save_every=3)
        check_recovered(run, bench.train(run, "resume=auto"), undisturbed)
        shutil.rmtree(run)

    in_parallel(kill_and_resume, enumerate(moments))


def test_twenty_runs_killed_at_random_go_on_to_the_same_bytes(
    bench: Bench, undisturbed: dict[str, str]
) -> None:
    kill_at_random(bench, undisturbed, kills=20, seed=3)


@pytest.mark.slow
def test_two_hundred_runs_killed_at_random_go_on_to_the_same_bytes(
    bench: Bench, undisturbed: dict[str, str]
) -> None:
    kill_at_random(bench, undisturbed, kills=215, seed=4)


def test_a_run_killed_five_times_in_a_row_ends_with_the_same_bytes(
    bench: Bench, undisturbed: dict[str, str]
) -> None:
    run = bench.folder / "run"
    for number in (9, 22, 31, 17, 40):
        killed = bench.train(run, "resume=auto", faults=[f"kill@write:{number}"])
        assert killed.code == -signal.SIGKILL, killed.err
        TALLY.add("kills at a write boundary")
        check_killed(run, save_every=3)
    check_recovered(run, bench.train(run, "resume=auto"), undisturbed)


def test_a_merge_killed_at_every_other_write_leaves_nothing_or_a_whole_model(bench: Bench) -> None:
    assert bench.train("run", "trainer.steps=4").code == 0
    base = bench.shared / "base"
    before = tree(base)
    words = ("merge", f"adapter_path={bench.folder / 'run/adapter'}", f"model.path={base}")
    counted = bench.loratune(*words, f"out={bench.folder / 'whole'}", faults=["count@write"])
    assert counted.code == 0, counted.err
    whole = _without_times(bench.folder / "whole")

    def kill_and_merge(number: int) -> None:
        out = bench.folder / f"merged{number}" / "model"
        killed = bench.loratune(*words, f"out={out}", faults=[f"kill@write:{number}"])
        assert killed.code == -signal.SIGKILL
        TALLY.add("kills at a write boundary")
        again = bench.loratune(*words, f"out={out}") if not out.exists() else killed
        assert again.code == 0 or out.exists(), again.err
        assert not differences(_without_times(out), whole)
        if again is not killed:
            assert [path.name for path in out.parent.iterdir()] == ["model"]

    in_parallel(kill_and_merge, range(1, len(counted.calls) + 1, 2))
    assert tree(base) == before


def _without_times(folder: Path) -> dict[str, str]:
    return {name: value for name, value in tree(folder).items() if name != "merge_report.json"}
