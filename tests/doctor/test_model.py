"""What ``doctor`` says of a base model, against what is known of its type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.command_line import CommandLine
from support.tiny_models import small_model, tiny_images_and_text, tiny_llama

from loratune.doctor.finding import Finding, Status
from loratune.doctor.model import check_model


def findings(folder: Path, model: Any) -> dict[str, Finding]:
    """Of a model's shapes alone: its config.json is all that lies there."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return {finding.name: finding for finding in check_model(str(folder))}


def test_a_plain_decoder_allows_everything(tmp_path: Path) -> None:
    found = findings(tmp_path, tiny_llama())
    assert {finding.status for finding in found.values()} == {Status.ok}
    assert found["all_linear"].detail == "14 layers"
    assert found["generation"].detail.startswith("several prompts at once, what they begin with")


def test_a_tower_that_reads_images_is_left_out_in_words(tmp_path: Path) -> None:
    found = findings(tmp_path, tiny_images_and_text())
    assert found["all_linear"].detail.startswith("14 layers; all_linear leaves out 12 layers")
    assert "without effect on the loss: model.visual (12)" in found["all_linear"].detail


def test_what_a_recurrent_model_does_without_is_a_warning(tmp_path: Path) -> None:
    found = findings(tmp_path, small_model("mamba", state_size=4, time_step_rank=4))
    warned = {name for name, finding in found.items() if finding.status is Status.warn}
    assert warned == {"packing", "shared beginnings"}
    assert found["packing"].fix.startswith("set data.packing=false")


def test_a_model_that_cannot_be_trained_fails(tmp_path: Path) -> None:
    found = findings(tmp_path, small_model("bert", is_decoder=False))
    assert list(found) == ["model", "all_linear", "causal"]
    assert found["causal"].status is Status.fail and "is not causal" in found["causal"].detail


@pytest.mark.parametrize("known", [True, False])
def test_the_command_takes_a_model(cli: CommandLine, tmp_path: Path, known: bool) -> None:
    folder = tmp_path / "base"
    if known:
        tiny_llama().config.save_pretrained(folder)
    outcome = cli(
        "doctor", f"model.path={folder}",
        faults=["empty@loratune.doctor.training.check_training:1"],
    )  # fmt: skip
    assert outcome.code == (0 if known else 4)
    assert ("ok    causal" in outcome.out) == known
    assert known or outcome.last.startswith("error[4] no such folder")
