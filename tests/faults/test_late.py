"""What fails late cannot harm what was published; the same run gives the same bytes."""

from __future__ import annotations

import pytest

from faults.conftest import Bench
from faults.harness import differences, in_parallel, result, tree
from faults.tally import TALLY
from faults.verify import check_told

STAGES = ("stages=[train,evaluate,merge]",)


def test_evaluation_rows_that_are_missing_are_found_before_training(bench: Bench) -> None:
    gone = bench.folder / "gone.jsonl"
    stopped = bench.train("run", f"data.eval_path={gone}")
    check_told(stopped, 3, "gone.jsonl")
    assert not (bench.folder / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "stage", ["later_stages.evaluate", "later_stages.merge", "records.finished_report"]
)
def test_a_stage_that_fails_late_leaves_the_adapter_published(bench: Bench, stage: str) -> None:
    assert bench.train("whole", *STAGES).code == 0
    run = bench.folder / "run"
    stopped = bench.train(run, *STAGES, faults=[f"enospc@loratune.pipeline.{stage}:1"])
    check_told(stopped, 8)
    adapter = run / "adapter"
    assert f"adapter saved: {adapter}" in stopped.out
    whole = tree(bench.folder / "whole" / "adapter") | {"README.md": tree(adapter)["README.md"]}
    assert tree(adapter) == whole  # its card has no scores yet
    resumed = bench.train(run, *STAGES, "resume=auto")
    assert resumed.code == 0, resumed.err
    assert not differences(result(run), result(bench.folder / "whole"))
    assert (run / "report.html").exists()


@pytest.mark.parametrize("reruns", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_clean_reruns_raise_no_false_alarm(bench: Bench, reruns: int) -> None:
    words = ("trainer.steps=4", "trainer.save_every=2")
    assert bench.train("first", *words).code == 0
    expected = result(bench.folder / "first")

    def rerun(number: int) -> None:
        run = bench.folder / f"run{number}"
        outcome = bench.train(run, *words)
        again = bench.train(run, *words, "resume=auto")
        alarm = outcome.code != 0 or again.code != 0 or bool(outcome.err + again.err)
        TALLY.add("clean reruns")
        TALLY.add("false alarms", int(alarm))
        assert not alarm, outcome.err + again.err
        different = differences(result(run), expected)
        TALLY.add("runs whose final bytes differ from the undisturbed run", bool(different))
        assert not different

    in_parallel(rerun, range(reruns))


def test_another_seed_gives_other_bytes(bench: Bench) -> None:
    for seed in (0, 1):
        assert bench.train(f"run{seed}", f"trainer.seed={seed}").code == 0
    weights = "adapter/adapter_model.safetensors"
    first, second = (result(bench.folder / f"run{seed}")[weights] for seed in (0, 1))
    assert first != second
