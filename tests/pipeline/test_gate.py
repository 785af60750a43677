"""``gate``: what passes, what does not, and what is not judged at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.command_line import CommandLine

KEPT = "evaluate.retention=[builtin:heldout]"
LENIENT = ("gate.max_forgetting=5", "gate.max_bytes=5MB", KEPT)


@pytest.fixture(scope="module")
def trained(cli: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gate") / "run"
    cli.succeeds("train", "recipe=smoke", "stages=[train,merge]", f"out={out}")
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_run_that_meets_every_demand_passes(cli: CommandLine, run: Path) -> None:
    words = (*LENIENT, "junit=gate.xml", "out=gate.json", "format=json")
    printed = json.loads(cli.succeeds("gate", f"run={run}", *words).out)
    assert printed == json.loads(Path("gate.json").read_text())
    assert printed["passed"] and all(demand["passed"] for demand in printed["demands"])
    names = [demand["name"] for demand in printed["demands"]]
    assert names == ["gain in loss", "forgetting on heldout", "adapter file", "merged model"]
    suite = ElementTree.parse("gate.xml").getroot()
    assert suite.attrib["tests"] == "4" and suite.attrib["failures"] == "0"
    assert [case.attrib["name"] for case in suite.iter("testcase")] == names


def test_every_demand_that_is_not_met_is_named_under_exit_code_11(
    cli: CommandLine, run: Path
) -> None:
    shutil.rmtree(run / "merged")
    demands = ("gate.min_gain=50", "gate.max_forgetting=-9", "gate.max_bytes=10", KEPT)
    outcome = cli("gate", f"run={run}", *demands, "junit=gate.xml", "out=gate.json")
    assert outcome.code == 11 and not outcome.has_traceback
    assert [line.partition(":")[0] for line in outcome.errors] == [
        "error[11] gain in loss",
        "error[11] forgetting on heldout",
        "error[11] adapter file",
        "error[11] merged model",
    ]
    assert not json.loads(Path("gate.json").read_text())["passed"]
    root = ElementTree.parse("gate.xml").getroot()
    assert root.attrib["failures"] == "4" and len(list(root.iter("failure"))) == 4


def test_the_whole_interval_must_lie_above_the_demand(cli: CommandLine, run: Path) -> None:
    words = ("gate.merge=false", "out=gate.json")
    cli.succeeds("gate", f"run={run}", *words)
    gain = json.loads(Path("gate.json").read_text())["evaluation"]["gains"]["loss"]
    between = (-gain["difference"] - gain["high"]) / 2
    assert -gain["high"] < between < -gain["difference"]
    assert cli("gate", f"run={run}", "gate.merge=false", f"gate.min_gain={between}").code == 11


def test_a_recipe_says_what_is_demanded(cli: CommandLine, run: Path) -> None:
    Path("recipes/recipe").mkdir(parents=True)
    recipe = "# @package _global_\ngate: {min_gain: 50, merge: false}\n"
    Path("recipes/recipe/strict.yaml").write_text(recipe)
    outcome = cli("gate", f"run={run}", "recipe=strict", "evaluate.generate=false")
    assert outcome.code == 11 and "demanded above 50" in outcome.last
    assert "'adapter' is fixed" in cli.refuses("gate", f"run={run}", "adapter=vera")


def test_the_base_passed_off_as_tuned_is_refused(cli: CommandLine, run: Path) -> None:
    cli.succeeds("rewind", f"run={run}", "scale=0", "scales=[0]", "out=nothing")
    shutil.rmtree(run / "adapter")
    shutil.copytree("nothing", run / "adapter")
    outcome = cli("gate", f"run={run}", "gate.merge=false")
    assert outcome.code == 4
    assert "the adapter changes nothing: the base is passed off as the tuned model" in outcome.last


def test_the_tuned_model_passed_off_as_base_is_refused(cli: CommandLine, run: Path) -> None:
    outcome = cli("gate", f"run={run}", f"model.path={run}/merged")
    assert outcome.code == 6 and "base: " in outcome.last
    outcome = cli("gate", f"run={run}", f"model.path={run}/merged", "allow_drift=[base]")
    assert outcome.code == 2 and "judges the run as it was trained" in outcome.last


def test_a_merged_model_that_is_the_base_is_refused(cli: CommandLine, run: Path) -> None:
    weights = run / "merged/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4:] = b"\0\0\0\0"
    weights.write_bytes(content)
    outcome = cli("gate", f"run={run}")
    assert outcome.code == 7 and "model.safetensors" in outcome.last


def test_test_rows_that_were_trained_on_are_refused(cli: CommandLine, run: Path) -> None:
    outcome = cli("gate", f"run={run}", "data.test_path=builtin:train", "gate.merge=false")
    assert outcome.code == 3 and "96 of 96 test rows were trained on" in outcome.last
    words = ("data.path=builtin:dev", "data.test_path=builtin:train", "gate.merge=false")
    outcome = cli("gate", f"run={run}", *words)
    assert outcome.code == 3 and "are not those that the adapter was trained on" in outcome.last


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["gate.metric=bluee"], 2, "gate.metric; did you mean 'bleu'?"),
        (["gate.max_forgetting=0.1"], 2, "nothing to measure forgetting on"),
        (["gate.max_bytes=much"], 2, "use a size"),
        (["out=run/summary.json"], 2, "sealed"),
    ],
)
def test_bad_input_is_one_line(words, code, said, cli: CommandLine, run: Path) -> None:
    outcome = cli("gate", "run=run", *words)
    assert outcome.code == code and said in outcome.last and not outcome.has_traceback
