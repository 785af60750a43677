"""Unusable rows or plans stop a run before its first step."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from faults.conftest import Bench, write_rows
from faults.harness import result
from faults.verify import check_told


def nothing_trained(run: Path) -> bool:
    return not (run / "checkpoints").exists() and not (run / "adapter").exists()


def test_rows_whose_every_answer_is_cut_off_are_refused(bench: Bench) -> None:
    rows = bench.folder / "long.jsonl"
    row = {"prompt": "q" * 40, "completion": "a"}
    rows.write_text((json.dumps(row) + "\n") * 12)
    stopped = bench.train("run", f"data.path={rows}", "data.max_length=16")
    check_told(stopped, 3, "12", "data.max_length")
    assert nothing_trained(bench.folder / "run")


def test_rows_without_an_answer_left_are_dropped_and_the_rest_trains_alike(bench: Bench) -> None:
    few, many = bench.folder / "few.jsonl", bench.folder / "many.jsonl"
    write_rows(few, range(12))
    long = json.dumps({"prompt": "q" * 40, "completion": "a"}) + "\n"
    many.write_text(few.read_text() + long * 4)
    for rows in (few, many):
        done = bench.train(rows.stem, f"data.path={rows}", "data.max_length=32")
        assert done.code == 0, done.err
    first, second = (result(bench.folder / name) for name in ("few", "many"))
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert first[name] == second[name]
    report = json.loads((bench.folder / "many" / "data.json").read_text())
    assert "4" in json.dumps(report)


def test_a_malformed_line_is_named_and_nothing_is_made(bench: Bench) -> None:
    rows = bench.copy("train.jsonl")
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([*lines[:2], lines[2].replace("}", ""), *lines[3:]]))
    check_told(bench.train("run", f"data.path={rows}"), 3, "train.jsonl:3")
    assert not (bench.folder / "run").exists()


def test_zero_optimizer_steps_are_refused(bench: Bench) -> None:
    rows = bench.folder / "none.jsonl"
    rows.write_text("\n\n")
    check_told(bench.train("run", f"data.path={rows}"), 3, "none.jsonl")
    assert not (bench.folder / "run").exists()


def test_a_named_pipe_is_refused_without_waiting(bench: Bench) -> None:
    pipe = bench.folder / "rows.jsonl"
    os.mkfifo(pipe)
    stopped = bench.train("run", f"data.path={pipe}")
    check_told(stopped, 3, "rows.jsonl")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("trainer.epochs=1",), "trainer.epochs"),
        (
            ("trainer.eval_every=2", "data.eval_path=null", "data.eval_fraction=0"),
            "trainer.eval_every",
        ),
        (("trainer.early_stop_patience=2",), "trainer.early_stop_patience"),
        (("stages=[merge]",), "stages"),
        (("trainer.lr=-1", "trainer.batch_size=0"), "trainer.batch_size"),
    ],
)
def test_contradictions_are_found_before_anything_is_made(
    bench: Bench, words: tuple[str, ...], named: str
) -> None:
    stopped = bench.train("run", *words, faults=["count@loratune.pipeline.run.run"])
    check_told(stopped, 2, named)
    assert stopped.calls == [] and not (bench.folder / "run").exists()
