"""SIGTERM and SIGINT save what was done, say how to go on, and mean what they say."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

import pytest
from support.command_line import Outcome

from faults.conftest import Bench
from faults.harness import differences, result
from faults.tally import TALLY
from faults.verify import check_recovered, check_told, verified_steps

STEP = "loratune.training.loop.train_step"


@pytest.fixture(scope="module")
def whole(session_bench: Bench) -> dict[str, str]:
    done = session_bench.train("signals", "stages=[train,evaluate,merge]")
    assert done.code == 0, done.err
    return result(session_bench.folder / "signals")


def resumed_like(bench: Bench, run: Path, stopped: Outcome, whole: dict[str, str]) -> None:
    """Type what the message says; the result is that of the run that was not stopped."""
    command = stopped.last.partition("resume with: ")[2]
    program, *words = shlex.split(command)
    assert program == "loratune"
    resumed = bench.loratune(*words)
    assert resumed.code == 0, resumed.err
    saved = [name for name in result(run) if name not in whole]  # the checkpoint of the stop
    kept = {name: value for name, value in result(run).items() if name not in saved}
    different = differences(kept, whole)
    TALLY.add("runs whose final bytes differ from the undisturbed run", bool(different))
    assert not different


@pytest.mark.parametrize(("kind", "code"), [("term", 75), ("int", 130)])
def test_a_signal_in_the_middle_of_a_step_saves_that_step(
    bench: Bench, whole: dict[str, str], kind: str, code: int
) -> None:
    run = bench.folder / "run"
    words = ("stages=[train,evaluate,merge]",)
    stopped = bench.train(run, *words, faults=[f"{kind}@{STEP}:5"])
    TALLY.add("SIGTERM and SIGINT")
    check_told(stopped, code, "step 5", f"loratune train resume={run}")
    assert verified_steps(run)[-1] == 5
    resumed_like(bench, run, stopped, whole)


def test_a_run_stopped_after_every_step_ends_with_the_same_bytes(
    bench: Bench, whole: dict[str, str]
) -> None:
    run = bench.folder / "run"
    words = ("stages=[train,evaluate,merge]",)
    for _ in range(4):
        stopped = bench.train(run, *words, "resume=auto", faults=[f"term@{STEP}:3"])
        TALLY.add("SIGTERM and SIGINT")
        check_told(stopped, 75)
    check_recovered(run, bench.train(run, *words, "resume=auto"), whole)


@pytest.mark.parametrize(
    "moment",
    [
        "loratune.pipeline.later_stages.evaluate",
        "loratune.pipeline.later_stages.merge",
        "loratune.pipeline.records.Records.finish",
    ],
)
def test_a_signal_after_training_ends_the_run_and_loses_nothing(
    bench: Bench, whole: dict[str, str], moment: str
) -> None:
    run = bench.folder / "run"
    stopped = bench.train(run, "stages=[train,evaluate,merge]", faults=[f"term@{moment}:1"])
    TALLY.add("SIGTERM and SIGINT")
    check_told(stopped, 75, f"resume={run}")
    resumed_like(bench, run, stopped, whole)


def test_a_signal_in_the_last_step_is_not_swallowed(bench: Bench) -> None:
    stopped = bench.train("run", faults=[f"term@{STEP}:12"])
    TALLY.add("SIGTERM and SIGINT")
    check_told(stopped, 75, "step 12")


def test_a_signal_before_training_has_nothing_to_save(bench: Bench) -> None:
    stopped = bench.train("run", faults=["term@loratune.pipeline.loading.load:1"])
    assert stopped.code == -signal.SIGTERM and not stopped.has_traceback
    assert not (bench.folder / "run" / "checkpoints").exists()
    interrupted = bench.train("run2", faults=["int@loratune.pipeline.loading.load:1"])
    check_told(interrupted, 130)


def test_a_second_interrupt_ends_at_once(bench: Bench) -> None:
    run = bench.folder / "run"
    stopped = bench.train(run, faults=[f"int2@{STEP}:5"])
    TALLY.add("SIGTERM and SIGINT")
    assert stopped.code == 130 and not stopped.has_traceback
    assert verified_steps(run) == [3]
    assert bench.train(run, "resume=auto").code == 0


def test_a_terminal_that_asks_again_and_again_is_answered(bench: Bench) -> None:
    run = bench.folder / "run"
    case = bench.start(run, "trainer.steps=4000")
    case.wait_until(run / "checkpoints" / "step_000003")
    case.signal(signal.SIGTERM)
    check_told(case.wait(), 75)
    TALLY.add("SIGTERM and SIGINT")
