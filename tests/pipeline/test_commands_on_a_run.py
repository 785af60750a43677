"""The later commands on a run: what they write, and that they say what the run itself says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.command_line import CommandLine

QUICK = ("evaluate.generate=false",)


@pytest.fixture(scope="module")
def trained(cli: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained, evaluated, merged and exported."""
    run = tmp_path_factory.mktemp("trained") / "run"
    words = ["stages=[train,evaluate,merge,export]", "export.format=portable", *QUICK]
    cli.succeeds("train", "recipe=smoke", f"out={run}", *words)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize("form", ["table", "json"])
@pytest.mark.parametrize("source", ["run", "adapter_path"])
def test_evaluate_writes_out_however_it_is_asked(
    cli: CommandLine, run: Path, form: str, source: str
) -> None:
    adapter = {"run": [f"run={run}"], "adapter_path": [f"adapter_path={run}/adapter"]}[source]
    rows = [] if source == "run" else ["data.test_path=builtin:test"]
    printed = cli.succeeds("evaluate", *adapter, *rows, f"format={form}", "out=scores.json", *QUICK)
    written = json.loads(Path("scores.json").read_text())
    assert written["adapted"]["loss"] < written["base"]["loss"]
    if form == "json":
        assert json.loads(printed.out) == written
    else:
        assert "scores: scores.json" in printed.out


def test_evaluate_leaves_the_runs_own_scores_as_they_are(cli: CommandLine, run: Path) -> None:
    before = (run / "evaluation.json").read_bytes()
    cli.succeeds("evaluate", f"run={run}", "data.eval_limit=3", *QUICK)
    assert (run / "evaluation.json").read_bytes() == before
    for out in (run, run / "evaluation.json"):
        error = cli.refuses("evaluate", f"run={run}", f"out={out}", *QUICK)
        assert "a finished run's records are sealed" in error and "evaluation.json" in error
    cli.succeeds("verify", f"run={run}")


def test_evaluate_writes_into_a_folder_and_into_a_run_that_has_no_scores(
    cli: CommandLine, run: Path
) -> None:
    Path("elsewhere").mkdir()
    cli.succeeds("evaluate", f"run={run}", "out=elsewhere", *QUICK)
    assert json.loads(Path("elsewhere/evaluation.json").read_text())["rows"]
    words = ("recipe=smoke", "stages=[train]", "trainer.steps=1", "out=unmeasured")
    cli.succeeds("train", *words)
    cli.succeeds("evaluate", "run=unmeasured", "out=unmeasured", *QUICK)
    cli.succeeds("verify", "run=unmeasured")
    assert json.loads(Path("unmeasured/evaluation.json").read_text())["rows"]


def test_a_run_and_the_commands_measure_and_say_the_same(cli: CommandLine) -> None:
    words = ("stages=[train,evaluate,merge,export]", "export.format=portable", *QUICK)
    whole = cli.succeeds("train", "recipe=smoke", "out=whole", *words).out.splitlines()

    def prints_what_the_run_printed(*words: str) -> None:
        for line in cli.succeeds(*words).out.splitlines():
            assert line in whole

    prints_what_the_run_printed("evaluate", "run=whole", *QUICK)
    for command in (("merge",), ("export", "format=portable")):
        shutil.rmtree(Path("whole") / {"merge": "merged"}.get(command[0], "export"))
        prints_what_the_run_printed(*command, "run=whole")
    assert any(line.startswith("exported portable: whole/export (ΔW differs") for line in whole)


def test_exporting_the_merged_model_merges(cli: CommandLine) -> None:
    words = ("recipe=smoke", "trainer.steps=2", "stages=[train,export]", "export.format=merged")
    printed = cli.succeeds("train", *words, "out=run")
    assert "merged model: run/merged" in printed.out
    assert Path("run/merged/merge_report.json").is_file() and not Path("run/export").exists()


def test_verify_and_report_take_a_run(cli: CommandLine, run: Path) -> None:
    assert cli.succeeds("verify", f"run={run}").out == cli.succeeds("verify", str(run)).out
    assert "name one folder to verify" in cli.refuses("verify", str(run), f"run={run}")
    (run / "report.html").unlink()
    cli.succeeds("report", f"run={run}")
    assert (run / "report.html").is_file()
    cli.succeeds("report", str(run), f"run={run}", "out=both.html")
    assert Path("both.html").is_file()
    assert "did you mean 'out'" in cli.refuses("report", f"run={run}", "ot=page.html")


def test_a_folder_that_is_not_a_run_is_refused_by_every_command(cli: CommandLine) -> None:
    Path("empty").mkdir()
    for command in ("evaluate", "merge", "export"):
        assert "run folder" in cli.refuses(command, "run=empty")
    assert "run folder" in cli.refuses("generate", "run=empty", "prompt=x")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("", "this is a run folder"),
        ("checkpoints/step_000002", "this is a checkpoint"),
        ("base", "this is a model"),
    ],
)
def test_what_is_named_in_place_of_an_adapter_is_said(
    cli: CommandLine, run: Path, tmp_path: Path, what: str, words: str
) -> None:
    (run / "checkpoints" / "step_000002").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "step_000002" / "manifest.json").touch()
    (run / "base").mkdir()
    (run / "base" / "config.json").write_text("{}")
    folder = run / what
    for command in ("merge", "evaluate"):
        told = cli.refuses(command, f"adapter_path={folder}", "model=demo", "out=x")
        assert "adapter_config.json is missing" in told and words in told


def test_an_adapter_or_a_file_named_as_the_base_is_said_to_be_one(
    cli: CommandLine, run: Path
) -> None:
    adapter = run / "adapter"
    for command in ("merge", "export"):
        told = cli.refuses(command, f"run={run}", f"model.path={adapter}", f"out={run / 'x'}")
        assert "this is an adapter, not a base model" in told
    file = adapter / "adapter_model.safetensors"
    told = cli.refuses("merge", f"run={run}", f"model.path={file}", f"out={run / 'x'}")
    assert "this is a file" in told and str(adapter) in told


def test_a_page_is_not_written_over_a_record_or_among_a_models_files(
    cli: CommandLine, run: Path
) -> None:
    for name, words in [
        ("recipe.yaml", "records are sealed"), ("adapter/page.html", "holds a model or an adapter"),
        ("adapter/adapter_config.json", "holds a model or an adapter"),
    ]:  # fmt: skip
        before = sorted(run.rglob("*"))
        assert words in cli.refuses("report", str(run), f"out={run / name}")
        assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("command", ["evaluate", "generate", "merge"])
def test_every_command_says_what_of_an_adapters_file_has_no_effect(
    cli: CommandLine, run: Path, command: str
) -> None:
    adapter = run / "adapter"
    (adapter / "loratune.json").unlink()  # as PEFT leaves it
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": {"^v_proj": 7}}))
    words = {
        "evaluate": ["data.eval_path=builtin:test", "data.eval_limit=2", *QUICK],
        "generate": ["prompt=hi", "max_new_tokens=1"],
        "merge": ["out=merged"],
    }[command]
    done = cli.succeeds(command, f"adapter_path={adapter}", "model.path=builtin:demo-opt", *words)
    assert "rank_pattern '^v_proj' of the adapter's file fits none" in done.out + done.err
