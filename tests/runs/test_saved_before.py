"""Runs that an earlier version wrote (``tests/saved_before``) are read, checked and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import CommandLine

SAVED = Path(__file__).parents[1] / "saved_before"
RUNS = sorted(path.name for path in SAVED.iterdir())
LATER_VERSIONS = "allow_drift=[versions]"


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The test's own copy."""
    return Path(shutil.copytree(SAVED / request.param, tmp_path / request.param))


every_run = pytest.mark.parametrize("run", RUNS, indirect=True)
merged_run = pytest.mark.parametrize("run", ["lora"], indirect=True)


@every_run
def test_its_adapter_has_the_losses_that_were_recorded(cli: CommandLine, run: Path) -> None:
    recorded = json.loads((run / "evaluation.json").read_text())
    now = json.loads(cli.succeeds("evaluate", f"run={run}", "format=json").out)
    for model in ("base", "adapted"):
        assert now[model]["loss"] == pytest.approx(recorded[model]["loss"], rel=1e-5)
        assert now[model]["tokens"] == recorded[model]["tokens"]


@every_run
def test_it_verifies_alone_and_against_its_base(cli: CommandLine, run: Path) -> None:
    cli.succeeds("verify", str(run))
    cli.succeeds("verify", str(run), "model.path=builtin:demo-opt")


@merged_run
def test_its_merged_model_verifies_and_a_merge_today_gives_the_same(
    cli: CommandLine, run: Path
) -> None:
    cli.succeeds("verify", str(run / "merged"), "model.path=builtin:demo-opt")
    before = load_file(run / "merged" / "model.safetensors")
    shutil.rmtree(run / "merged")
    cli.succeeds("merge", f"run={run}")
    now = load_file(run / "merged" / "model.safetensors")
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        # Corrections are summed in fp32 and rounded once to bf16: another processor's order of
        # summation may land on the neighbouring number.
        torch.testing.assert_close(now[name], tensor, rtol=2**-7, atol=1e-6, msg=name)
    cli.succeeds("verify", str(run / "merged"), "model.path=builtin:demo-opt")


@every_run
def test_it_resumes_from_its_checkpoint_to_the_same_adapter(cli: CommandLine, run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step_000006")
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "merged", ignore_errors=True)
    (run / "evaluation.json").unlink()
    (run / "summary.json").unlink()
    cli.succeeds("train", f"resume={run}", LATER_VERSIONS)
    before = load_file(SAVED / run.name / "adapter" / "adapter_model.safetensors")
    now = load_file(run / "adapter" / "adapter_model.safetensors")
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(now[name], tensor, rtol=0, atol=1e-4, msg=name)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step_000003", "step_000006",
    ]  # fmt: skip
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6]
