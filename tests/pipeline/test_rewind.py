"""``rewind``: the scale of a trained adapter, folded in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import CommandLine
from support.tiny_models import tiny_llama

import loratune
from loratune.adapters.base import Adapter
from loratune.adapters.lora.module import LoRA
from loratune.errors import ModelError
from loratune.stages.rewind import Strength

KEPT = "evaluate.retention=[builtin:heldout]"


@pytest.fixture(scope="module")
def run(cli: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rewind") / "run"
    words = ("recipe=smoke", "stages=[train]", "trainer.steps=12", "trainer.precision=fp32")
    cli.succeeds("train", *words, f"out={out}")
    return out


def losses(cli: CommandLine, *words: str) -> dict[str, float]:
    fixed = ("data.test_path=null", "evaluate.generate=false", "trainer.precision=fp32")
    words = (*fixed, "format=json", *words)
    scores = json.loads(cli.succeeds("evaluate", *words).out)
    return {side: scores[side]["loss"] for side in ("base", "adapted")}


def test_a_sweep_chooses_writes_and_shows_a_scale(cli: CommandLine, run: Path) -> None:
    printed = cli.succeeds("rewind", f"run={run}", "scales=[1,0,0.5]", "keep=0.4", KEPT, "out=new")
    record = json.loads(Path("new/rewind.json").read_text())
    points = {point["scale"]: point for point in record["points"]}
    assert list(points) == [0, 0.5, 1] and record["scale"] == 0.5
    assert "scale 0.5, the smallest that keeps 40%" in printed.out
    assert "Scale 0.5 was taken" in Path("new/rewind.html").read_text()
    measured = losses(cli, f"run={run}")
    assert points[0]["dev"]["loss"] == measured["base"]
    assert points[1]["dev"]["loss"] == measured["adapted"]
    half = losses(cli, "adapter_path=new", "model.path=builtin:demo-opt")
    assert half["adapted"] == pytest.approx(points[0.5]["dev"]["loss"], rel=1e-6)
    assert half["base"] > half["adapted"] > measured["adapted"]
    cli.succeeds("verify", "new", "model.path=builtin:demo-opt")


def test_both_ends_are_base_and_adapter_to_the_byte(cli: CommandLine, run: Path) -> None:
    for scale in ("0", "1"):
        words = (f"scale={scale}", "scales=[1]", f"out=at{scale}")
        cli.succeeds("rewind", f"run={run}", *words)
    name = "adapter_model.safetensors"
    assert (Path("at1") / name).read_bytes() == (run / "adapter" / name).read_bytes()
    nothing = losses(cli, "adapter_path=at0", "model.path=builtin:demo-opt")
    assert nothing["adapted"] == nothing["base"]


def test_a_variant_that_cannot_be_scaled_is_refused_by_name(monkeypatch) -> None:
    wrapped = loratune.wrap(tiny_llama(), "lora", targets=["q_proj"])
    monkeypatch.setattr(LoRA, "scaled_tensors", Adapter.scaled_tensors)
    with pytest.raises(ModelError, match="lora cannot be trained and then scaled"):
        Strength(wrapped).set(0.5)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["scales=[0,7]"], 2, "7 is out of range"),
        (["scales=[]"], 2, "no scale to try"),
        (["keep=2"], 2, "use (0, 1]"),
        (["data.eval_path=null"], 2, "no rows to choose by"),
    ],
)
def test_bad_input_is_one_line(words, code, said, cli: CommandLine, run: Path) -> None:
    outcome = cli("rewind", f"run={run}", "out=new", *words)
    assert outcome.code == code and said in outcome.last and not Path("new").exists()
