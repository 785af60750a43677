"""The benchmark scripts run at micro size, and the page says what their results say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.peft_oracle import PEFT_ABOUT_ITSELF

import loratune
from loratune.adapters.registry import variant_names

REPOSITORY = Path(loratune.__file__).resolve().parent.parent
OWN_HEAD = {"loratune LoRA, own loss head"}
pytestmark = [
    *PEFT_ABOUT_ITSELF,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated.*:FutureWarning"),
]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of benchmarks/, which is no part of the installed package."""
    monkeypatch.syspath_prepend(str(REPOSITORY))

    def module(name: str) -> ModuleType:
        return importlib.import_module(f"benchmarks.{name}")

    return module


@pytest.fixture
def run(benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run one benchmark at micro size and return what it wrote."""

    def one(name: str, *words: str) -> dict[str, Any]:
        options = ["--size", "micro", "--threads", "1", "--results", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [name, *options, *words])
        benchmark(name).main()
        record: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
        return record

    return one


def test_step_times_every_variant_and_counts_what_it_saves(run: Any, benchmark: Any) -> None:
    record = run("step")
    rows = {row["name"]: row for row in record["tables"]["short"]["rows"]}
    assert rows["floor"]["ratio"]["median"] == 1.0
    titles = {name: benchmark("models").title(name) for name in variant_names()}
    assert {f"loratune {title}" for title in titles.values()} <= set(rows)
    peft = {row.removeprefix("PEFT ") for row in rows if row.startswith("PEFT")}
    assert {"LoRA", "LoRA-FA", "VeRA"} == peft & {"LoRA", "LoRA-FA", "LoRA+", "VeRA"}
    assert peft <= set(titles.values())
    saved = {row["name"] for row in record["saved"]}
    assert saved == {name for name in rows if name.startswith(("loratune", "PEFT"))} - OWN_HEAD
    assert all(row["seconds"]["median"] > 0 and row["seconds"]["n"] == 2 for row in rows.values())
    fa = [row for row in record["saved"] if row["name"] == "loratune LoRA-FA"]
    numbers = record["rank_numbers"]["lora_fa"]
    assert {row["bytes"] for row in fa} == {numbers * 4, numbers * 2}
    assert record["machine"]["threads"] == 1 and record["versions"]["torch"]


def test_scaling_varies_one_size_at_a_time(run: Any) -> None:
    points = run("scaling")["points"]
    ranks = [point for point in points if point["varies"] == "rank"]
    narrow, wide = ({row["name"]: row["saved_bytes"] for row in point["rows"]} for point in ranks)
    assert len({point["length"] for point in ranks}) == 1
    assert narrow["floor"] == wide["floor"] == 0
    assert narrow["LoRA-FA"] * 2 == wide["LoRA-FA"] > 0  # r numbers


def test_shared_beginnings_are_computed_once(run: Any) -> None:
    points = {(point["prefix"], point["rows"]): point for point in run("growth")["points"]}
    computed = {key: (one["shared"]["computed"], one["each row alone"]["computed"])
                for key, one in points.items()}  # fmt: skip
    assert computed == {(0, 1): (4, 4), (0, 2): (8, 8), (8, 1): (12, 12), (8, 2): (16, 24)}
    assert all(one["shared"]["seconds"]["median"] > 0 for one in points.values())


def test_training_takes_turns_on_rows_of_its_own_without_shared_data(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORATUNE_SHARED", str(tmp_path / "nothing"))
    record = run("e2e", "--only", "loratune, fp32")
    [row] = record["groups"]["fp32"]
    assert "written by the script" in record["settings"]["rows"]
    assert len(row["losses"]) == 3 and row["rows_per_second"] > 0
    assert 0 < row["fill"] <= 1 and row["peak_bytes"] > 1 << 20


def test_the_cuda_script_runs_its_candidates(run: Any, benchmark: Any) -> None:
    record = run("cuda", "--device", "cpu")
    assert list(record["tables"]) == [
        f"{size}_{dtype}" for size in ("small", "large") for dtype in ("bfloat16", "float32")
    ]
    page = benchmark("render").cuda({"cuda": record})
    for found in record["tables"].values():
        assert not found["failures"]
        rows = {row["name"]: row for row in found["rows"]}
        assert {"floor", "PEFT LoRA", "loratune LoRA-FA"} <= set(rows)
        assert "loratune LoRA, checkpointing" in rows
        assert rows["floor"]["ratio"]["median"] == 1.0
        assert all(name in page and row["tokens_per_second"] > 0 for name, row in rows.items())


@pytest.mark.slow
def test_training_against_the_others_gives_the_same_losses(run: Any) -> None:
    groups = run("e2e")["groups"]
    same = {row["name"]: row["losses"] for row in groups["fp32"] if row["same_order"]}
    ours = same.pop("loratune, fp32")
    assert {"TRL + PEFT, fp32, best padded", "Trainer + PEFT, fp32"} <= set(same)
    for losses in same.values():
        assert losses == pytest.approx(ours, abs=2e-3)
    assert len(groups["fp32"]) == 6 and len(groups["bf16"]) == 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_the_compiler_works_for_two_lengths_and_no_more(run: Any) -> None:
    for trial in run("compiling")["trials"].values():
        assert trial["compiling"] > 0 and trial["recompiled"] == 0
        assert [row["name"] for row in trial["rows"]] == ["eager", "compiled"] * 5
    assert trial["difference"] < 0.05


def test_seconds_to_a_loss_lie_on_the_line_between_two_looks(benchmark: Any) -> None:
    dev_loss = benchmark("dev_loss")
    fast = [{"seconds": 0.0, "loss": 5.0}, {"seconds": 10.0, "loss": 3.0}]
    slow = [{"seconds": 0.0, "loss": 5.0}, {"seconds": 90.0, "loss": 4.0}]
    assert dev_loss.common_target([fast, slow]) == 4.0
    assert dev_loss.seconds_to(4.0, fast) == 5.0
    assert dev_loss.seconds_to(4.0, slow) == 90.0
    assert dev_loss.seconds_to(6.0, fast) == 0.0
    assert dev_loss.seconds_to(2.0, fast) is None


def test_looks_between_steps_count_no_start_and_no_look(benchmark: Any) -> None:
    steps = [{"seconds": 70.0, "dev": 5.0}, {"seconds": 2.0}, {"seconds": 3.0, "dev": 4.0}]
    assert benchmark("e2e").looks(steps) == [
        {"steps": 1, "seconds": 0.0, "loss": 5.0},
        {"steps": 3, "seconds": 5.0, "loss": 4.0},
    ]


def test_the_loss_on_unseen_rows_is_torchs_mean_over_supervised_tokens(
    benchmark: Any, tmp_path: Path
) -> None:
    rows = [
        {"ids": [2, 9, 8, 7], "labels": [-100, -100, 8, 7]},
        {"ids": [2, 5, 6], "labels": [-100, 5, 6]},
    ]
    (tmp_path / "encoded.json").write_text(json.dumps({"dev": rows}))
    models = benchmark("models")
    model = models.frozen_opt(models.MICRO).train()
    one_by_one = [
        model(input_ids=torch.tensor([row["ids"]]), labels=torch.tensor([row["labels"]])).loss
        for row in rows
    ]
    found = benchmark("dev_loss").DevLoss(tmp_path / "encoded.json").of(model)
    assert found == pytest.approx(float(sum(one_by_one)) / 2, rel=1e-5)
    assert model.training


@pytest.mark.slow
def test_merge_and_startup_run_in_processes_of_their_own(run: Any) -> None:
    names = [row["name"] for row in run("merge")["rows"]]
    assert names[0] == "copy, hash, sync" and "loratune merge, all linear layers" in names
    assert all(row["seconds"]["median"] > 0 for row in run("startup")["rows"])


def test_the_page_is_what_the_renderer_makes_of_the_results(benchmark: Any) -> None:
    render = benchmark("render")
    results = render.read_results()
    assert {record["size"] for record in results.values()} <= {"full"}
    page = render.render(render.TEMPLATE.read_text(encoding="utf-8"), results)
    assert page == render.PAGE.read_text(encoding="utf-8"), "run python -m benchmarks.render"
    assert "{{" not in page


def test_a_page_without_results_says_so(benchmark: Any) -> None:
    render = benchmark("render")
    page = render.render(render.TEMPLATE.read_text(encoding="utf-8"), {})
    assert "No CUDA device was at hand" in page
    assert page.count(render.NONE) > 5 and "not measured" in page


def test_goals_are_judged_on_unrounded_numbers(benchmark: Any) -> None:
    goals = benchmark("goals")
    by_name = {goal.name: goal for goal in goals.GOALS}
    lora = by_name["LoRA r16, step / floor"]
    assert lora.is_met(1.10) and not lora.is_met(1.104)
    assert lora.measured({}) is None
    rows = by_name["rows/s against TRL + PEFT as shipped, both fp32"]
    assert rows.is_met(2.5) and not rows.is_met(2.499)


def test_processes_counts_the_bytes_that_a_step_hands_to_the_others(run: Any) -> None:
    """Three counts, the gradients of everything that trains, the loss: once each."""
    record = run("processes")
    alone, two = record["rows"]
    for row in (alone, two):
        assert row["messages"] == [3 * 8, 4 * row["trained"], 8]
    assert alone["sent_bytes"] == 0
    assert two["sent_bytes"] == two["payload_bytes"] == sum(two["messages"])
    assert two["rows_per_cpu_second"] > 0


def test_sharded_loading_reads_every_byte_of_the_base_once(run: Any) -> None:
    record = run("sharded_loading", "--processes", "2")
    [measured] = record["runs"]
    assert sum(rank["sliced"] for rank in measured["ranks"]) == record["settings"]["base"]
    assert all(rank["peak_reading"] >= rank["own"] > 0 for rank in measured["ranks"])


def test_where_every_number_trains_each_process_reads_its_rows_twice(run: Any) -> None:
    """The base's, and those of the copies that train."""
    record = run("sharded_training", "--processes", "2")
    [measured] = record["runs"]
    assert sum(rank["sliced"] for rank in measured["ranks"]) == 2 * record["settings"]["base"]
    assert all(rank["peak_steps"] and rank["peak_saving"] for rank in measured["ranks"])


@pytest.mark.parametrize(
    ("row", "columns", "template"),
    [
        ({"prompt": "a", "completion": " b"}, {"prompt": "prompt", "response": "completion"}, ""),
        ({"messages": [{"role": "user", "content": "a"}]}, {"messages": "messages"}, "smollm2"),
    ],
)
def test_llama_factory_gets_the_rows_as_they_are(
    benchmark: Any, tmp_path: Path, row: dict[str, Any], columns: dict[str, str], template: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    job = {"rows": str(tmp_path / "rows.jsonl"), "model": "m", "rank": 4, "targets": ["q", "v"]}
    job |= {"max_length": 9, "out": "o", "batch": 2, "steps": 3, "precision": "fp32"}
    settings = benchmark("e2e_llama_factory").settings(job)
    facts = json.loads((tmp_path / "dataset_info.json").read_text())[settings["dataset"]]
    assert facts["columns"] == columns and facts["file_name"] == "rows.jsonl"
    assert settings["template"] == (template or "empty")
    assert settings["lora_target"] == "q,v" and settings["bf16"] is False


def test_a_trainer_that_needs_another_python_is_left_out_and_named_without_one(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    e2e = benchmark("e2e")
    monkeypatch.delenv(e2e.INTERPRETER, raising=False)
    other = e2e.Contender("other", e2e.LLAMA_FACTORY)
    found = e2e.take_turns([other], e2e.Task(), tmp_path, tmp_path / "runs", [], None)
    assert found == [] and "other: left out, LORATUNE_LLAMA_FACTORY" in capsys.readouterr().out
    monkeypatch.setenv(e2e.INTERPRETER, "/a/python")
    assert other.interpreter() == "/a/python"
