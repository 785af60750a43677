"""The model card: metadata that huggingface_hub takes, and figures that are the records'."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from support.command_line import CommandLine

from loratune.adapter_files.peft_format import read_adapter
from loratune.compare.statistics import share_interval
from loratune.report.card import CardSubject, adapter_card, merged_card, subject_of
from loratune.report.records import read_run
from loratune.units import percent
from loratune.verify import verify

FACTORS = ("a.lora_A.weight", "a.lora_B.weight")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cli: CommandLine) -> Path:
    here = tmp_path_factory.mktemp("card")
    cli.succeeds(
        "train", "recipe=smoke", "trainer.steps=4", "evaluate.generate=true",
        "stages=[train,evaluate,merge,export]", f"out={here / 'run'}", cwd=here,
    )  # fmt: skip
    return here / "run"


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def subject(folder: Path, **changes: Any) -> CardSubject:
    adapter = read_adapter(folder / "adapter")
    return replace(subject_of(adapter.path, adapter.facts, adapter.peft), **changes)


@pytest.mark.parametrize(
    ("folder", "library"), [("adapter", "peft"), ("merged", "transformers"), ("export", "peft")]
)
def test_every_published_folder_has_a_card_that_the_hub_reads(
    folder: str, library: str, run: Path
) -> None:
    card = ModelCard(card_of(run / folder))
    data = card.data
    assert isinstance(data, ModelCardData)
    assert data.library_name == library and data.pipeline_tag == "text-generation"
    assert data.tags == ["loratune", "lora"]
    assert data.base_model is None  # an embedded model is not on the hub
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()


def test_a_base_on_the_hub_is_named_as_the_hub_wants_it(run: Path) -> None:
    records = read_run(run)
    recipe = {**records.recipe, "model": {"path": "HuggingFaceTB/SmolLM2-135M-Instruct"}}
    one = subject(run, run=replace(records, recipe=recipe))
    data = ModelCard(adapter_card(one, FACTORS)).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.to_dict()["base_model_relation"] == "adapter"
    data = ModelCard(merged_card(one, ["proved"])).data
    assert data.to_dict()["base_model_relation"] == "finetune"


def test_a_folder_is_named_without_the_way_to_it(run: Path) -> None:
    records = read_run(run)
    recipe = {**records.recipe, "model": {"path": "/home/somebody/private/models/llama"}}
    text = adapter_card(subject(run, run=replace(records, recipe=recipe)), FACTORS)
    assert "somebody" not in text and "on llama." in text
    assert ModelCard(text).data.base_model is None


def test_the_figures_are_the_records(run: Path) -> None:
    scores = json.loads((run / "evaluation.json").read_text())
    rows = json.loads((run / "data.json").read_text())
    facts = json.loads((run / "adapter" / "loratune.json").read_text())
    text = card_of(run / "adapter")
    for key in ("base", "tokenizer", "data", "encoded"):
        assert f"sha256 `{facts[key]}`" in text
    for side in ("train", "eval"):
        assert f"{side} rows: {rows[side]['kept']:,} of {rows[side]['rows']:,}" in text
    share, prompts = scores["adapted"]["exact_match"], scores["adapted"]["prompts"]
    low, high = share_interval(share * prompts, prompts)
    assert f"{prompts} prompts: {percent(low)} to {percent(high)}" in text
    report = json.loads((run / "merged" / "merge_report.json").read_text())
    worst = max(proof["residual"] for proof in report["modules"])
    assert f"{worst:.1e}" in card_of(run / "merged")
    difference = report["logits"]["max_difference"]
    assert f"largest difference {difference:.1e}" in card_of(run / "merged")
    certificate = json.loads((run / "export" / "certificate.json").read_text())
    assert f"{certificate['proof']['worst_relative_difference']:.1e}" in card_of(run / "export")


def test_a_card_that_somebody_edits_does_no_harm(run: Path, tmp_path: Path) -> None:
    assert verify(run).problems == []
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for folder in ("adapter", "merged", "export"):
        assert (copy / folder / "README.md").is_file()
        (copy / folder / "README.md").write_text("# mine\n")
    assert verify(copy).problems == []
    assert read_adapter(copy / "adapter").tensors


def test_hostile_records_stay_text(run: Path) -> None:
    path = "x`\n---\nlicense: evil\n---\n<script>alert(1)</script>\x1b[31m"
    template = "```\n# Heading {prompt}\n---\n"
    facts = {"base_path": path, "prompt_format": {"template": template}, "variant": "a: [b"}
    card = ModelCard(adapter_card(CardSubject(facts, {}), FACTORS))
    assert card.data.license is None and card.data.tags == ["loratune", "a: [b"]
    assert "\x1b" not in card.content and "<script>" not in card.content
    assert "\n# Heading" not in card.content and "\n```\n# " not in card.content


def test_what_a_server_needs_is_said_by_its_rules(run: Path) -> None:
    def text(**peft: Any) -> str:
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **peft}
        return adapter_card(subject(run, peft=settings), FACTORS)

    assert "--lora-modules adapter=THIS-FOLDER" in text()
    assert "--max-lora-rank 64 --lora-modules adapter=THIS-FOLDER" in text(r=64)
    assert "format=portable" in text(alpha_pattern={"a": 1})
    assert "format=merged" in text(modules_to_save=["lm_head"])


def test_a_resumed_run_has_the_same_card(run: Path) -> None:
    assert card_of(run / "adapter") == adapter_card(
        subject(run), sorted(read_adapter(run / "adapter").tensors)
    )
