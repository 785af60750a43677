"""A mixture of sources: resumed, over two processes, and with one of its sources changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from faults.conftest import Bench, write_rows
from faults.harness import result
from faults.tally import TALLY
from faults.test_processes import run_both
from faults.test_resume import cut
from faults.verify import check_recovered, check_told

Records = list[dict[str, float]]


def mixed(folder: Path, task: str = "weight: 2", name: str = "general") -> tuple[str, ...]:
    """Twelve rows of a task and four of general text, in shares of 2 : 1."""
    sources = f"[{{path: {folder}/task.jsonl, {task}}}, {{path: {folder}/{name}.jsonl}}]"
    return (
        "data.path=null", f"data.sources={sources}", "data.eval_path=null",
        "data.eval_fraction=0.2", "trainer.eval_every=3",
    )  # fmt: skip


def write_sources(folder: Path) -> None:
    write_rows(folder / "task.jsonl", range(15))
    texts = [{"text": f"{n % 10} {n % 7} {n % 3} rivers"} for n in range(5)]
    (folder / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))


def lines(run: Path) -> Records:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(session_bench: Bench) -> Path:
    """An undisturbed run of 12 steps, three epochs of the mixture."""
    write_sources(session_bench.folder)
    run = session_bench.folder / "mixture"
    outcome = session_bench.train(run, *mixed(session_bench.folder))
    assert outcome.code == 0, outcome.err
    assert "12 steps of 2 × 2 rows = 3.00 epochs, each drawing 16 rows" in outcome.out
    # 11 and 5 of the 16 rows an epoch
    assert "task 2.75 times, general 3.75 times" in outcome.out
    return run


def test_a_mixture_resumes_to_the_same_bytes(
    bench: Bench, whole: Path, session_bench: Bench
) -> None:
    for step in (3, 6, 9):
        run = cut(whole, bench.folder / f"from{step}", step)
        words = mixed(session_bench.folder)
        check_recovered(run, bench.train(run, *words, "resume=auto"), result(whole))
        TALLY.add("resumes compared byte for byte")


def test_two_processes_give_each_source_the_same_losses_and_resume_to_the_same_bytes(
    bench: Bench, session_bench: Bench, whole: Path
) -> None:
    words = (*mixed(session_bench.folder), "adapter.dropout=0")
    assert bench.train("one", *words).code == 0
    run_both(bench, bench.folder / "two", *words)
    one, two = lines(bench.folder / "one"), lines(bench.folder / "two")
    keys = [key for key in one[0] if key.startswith("train/loss/")]
    assert keys == ["train/loss/task", "train/loss/general"]
    for mine, others in zip(one, two, strict=True):
        losses = {key: value for key, value in mine.items() if "/loss" in key}
        assert losses == pytest.approx({key: others[key] for key in losses}, rel=1e-5)
    run = cut(bench.folder / "two", bench.folder / "resumed", 6)
    first, _ = run_both(bench, run, *words, "resume=auto")
    check_recovered(run, first, result(bench.folder / "two"))


def test_evaluation_records_the_loss_of_each_source(whole: Path) -> None:
    evaluations = [line for line in lines(whole) if "eval/loss" in line]
    assert len(evaluations) == 4
    for line in evaluations:
        assert {"eval/loss/task", "eval/loss/general"} <= set(line)
        own = [line["eval/loss/task"], line["eval/loss/general"]]
        assert min(own) < line["eval/loss"] < max(own)


def test_packing_and_accumulation_count_the_same_tokens_for_a_source(
    bench: Bench, session_bench: Bench
) -> None:
    """The first step starts from the same adapter: the losses are the same to rounding."""
    words = (*mixed(session_bench.folder), "adapter.dropout=0", "trainer.steps=1")
    ways = {
        "plain": ("trainer.batch_size=4", "trainer.grad_accum_steps=1"),
        "accumulated": ("trainer.batch_size=1", "trainer.grad_accum_steps=4"),
        "packed": ("data.packing=true",),
        "ungrouped": ("data.group_by_length=false",),
    }
    losses = {}
    for name, more in ways.items():
        given = {word.partition("=")[0] for word in more}
        outcome = bench.train(name, *(w for w in words if w.partition("=")[0] not in given), *more)
        assert outcome.code == 0, outcome.err
        first = lines(bench.folder / name)[0]
        losses[name] = {key: value for key, value in first.items() if "/loss" in key}
    assert losses["accumulated"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["packed"] == pytest.approx(losses["ungrouped"], rel=1e-5)


def test_a_changed_source_is_named_and_can_be_allowed(
    bench: Bench, session_bench: Bench, whole: Path
) -> None:
    half = cut(whole, bench.folder / "half", 6)
    for name in ("task", "general"):
        shutil.copy(session_bench.folder / f"{name}.jsonl", bench.folder)
    moved = bench.train(shutil.copytree(half, "moved"), *mixed(bench.folder), "resume=auto")
    assert moved.code == 0, moved.err  # where a source lies is no change
    run = shutil.copytree(half, bench.folder / "run")
    heavier = mixed(bench.folder, "weight: 3")
    outcome = bench.train(run, *heavier, "resume=auto")
    check_told(outcome, 6, "data.sources.task.weight: 2.0 → 3.0")
    assert len(outcome.errors) == 1
    text = (bench.folder / "general.jsonl").read_text().replace("4 4 1", "4 4 2")
    (bench.folder / "general.jsonl").write_text(text)
    outcome = bench.train(run, *mixed(bench.folder), "resume=auto")
    check_told(outcome, 6, "data.sources.general.rows: ")
    assert len(outcome.errors) == 1 and "allow_drift=[data.sources.general.rows]" in outcome.err
    allowed = "allow_drift=[data.sources.general.rows]"
    outcome = bench.train(run, *mixed(bench.folder), "resume=auto", allowed)
    assert outcome.code == 0 and "drift allowed: data.sources.general.rows" in outcome.out


def test_another_set_of_sources_is_named(bench: Bench, session_bench: Bench, whole: Path) -> None:
    half = cut(whole, bench.folder / "half", 6)
    shutil.copy(session_bench.folder / "general.jsonl", session_bench.folder / "replay.jsonl")
    words = mixed(session_bench.folder, name="replay")
    outcome = bench.train(half, *words, "resume=auto")
    check_told(outcome, 6, "data.sources.general.rows: ")
    assert "data.sources.replay.weight: null → 1.0" in outcome.err


def test_a_finished_run_evaluates_each_source_in_its_recorded_format(
    bench: Bench, session_bench: Bench, whole: Path
) -> None:
    facts = json.loads((whole / "adapter" / "loratune.json").read_text())
    formats = {name: one["format"] for name, one in facts["source_formats"].items()}
    assert formats == {"task": "prompt", "general": "text"}
    outcome = bench.loratune("evaluate", f"run={whole}", "format=json")
    assert outcome.code == 0, outcome.err
    adapted = json.loads(outcome.out)["adapted"]
    last = lines(whole)[-1]
    best = min((line for line in lines(whole) if "eval/loss" in line), key=lambda o: o["eval/loss"])
    assert last["step"] == 12
    for name in ("task", "general"):
        assert adapted["source_losses"][name] == pytest.approx(best[f"eval/loss/{name}"], rel=1e-5)
