"""Published parameter counts: exact numbers from an independent list, verdicts by rounding."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from support.tolerance import T0
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from loratune.adapters.lora.config import LoRAConfig
from loratune.counting.published import PUBLISHED_COUNTS, PublishedRow, published_report
from loratune.counting.rounding import Verdict, judge
from loratune.files import read_json
from loratune.targets.patterns import block_of

# Typed by hand from the sources and from PEFT's own counts, never from this package.
EXPECTED: dict[str, int] = json.loads((Path(__file__).parent / "published_counts.json").read_text())
ROWS = {row.id: row for row in published_report()}
WRONG = {
    "peft_draft_lora_fa_opt_125m",
    "peft_draft_lora_fa_opt_125m_percent",
    "peft_draft_lora_fa_opt_350m",
    "peft_draft_lora_fa_opt_350m_percent",
    "peft_draft_lora_fa_opt_1_3b",
    "peft_draft_lora_fa_opt_1_3b_percent",
    "loralib_readme_roberta_base",
    "lora_t10_deberta_xxl",
    "lora_t3_gpt2_medium",
    "lora_t3_gpt2_large",
    "lora_t3_full_gpt2_medium",
    "lora_gpt3_d4_all_r2",
    "lora_gpt3_all_r64",
    "vera_t1_roberta_large_vera_r16",
    "vera_t1_gpt3_vera_r16",
    "vera_t1_gpt3_vera_r256",
    "square_vera",
}


@pytest.mark.case(74, T0)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_the_exact_number_of_a_published_cell(row: PublishedRow) -> None:
    if row.verdict is Verdict.not_reproducible:
        assert row.exact is None
    elif row.quantity.startswith("percent"):
        assert isinstance(row.exact, float)
    else:
        assert row.exact == EXPECTED[row.id]


def test_every_expected_number_belongs_to_a_row() -> None:
    assert EXPECTED.keys() <= ROWS.keys()
    assert len(EXPECTED) > 100


def test_the_wrong_cells_are_those_that_no_rounding_explains() -> None:
    assert {row.id for row in ROWS.values() if row.verdict is Verdict.wrong} == WRONG
    unexplained = [row for row in ROWS.values() if row.verdict is Verdict.not_reproducible]
    assert [row.id for row in unexplained] == ["vera_t2_roberta_large_lora_fa"]


def test_every_wrong_cell_says_why() -> None:
    for row in ROWS.values():
        if row.verdict in (Verdict.wrong, Verdict.not_reproducible):
            assert row.explanation


def test_a_wrong_cell_names_the_recipe_that_gives_it() -> None:
    content = read_json(PUBLISHED_COUNTS)
    for row in content["rows"]:
        assert ("meant" in row) == bool(ROWS[row["id"]].meant)


def test_a_broken_formula_changes_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    count = LoRAConfig.count
    monkeypatch.setattr(LoRAConfig, "count", lambda self, layers: count(self, layers[1:]))
    broken = {row.id: row.verdict for row in published_report()}
    assert broken["peft_guide_opt_350m"] is Verdict.wrong
    assert ROWS["peft_guide_opt_350m"].verdict is Verdict.right


@pytest.mark.parametrize(
    ("printed", "unit", "exact", "verdict"),
    [
        ("1,572,864", "", Fraction(1572864), Verdict.right),
        ("1,572,865", "", Fraction(1572864), Verdict.wrong),
        ("0.3", "M", Fraction(294912), Verdict.rounded),
        ("18.8", "M", Fraction(18874368), Verdict.truncated),
        ("18.9", "M", Fraction(18874368), Verdict.rounded),
        ("19.0", "M", Fraction(18874368), Verdict.wrong),
        ("1.12", "MiB", Fraction(1179648), Verdict.rounded),
        ("1.13", "MiB", Fraction(1179648), Verdict.rounded),
        ("195", "KiB", Fraction(199680), Verdict.right),
        ("0.333", "%", Fraction(1, 3), Verdict.rounded),
    ],
)
def test_a_printed_number_is_judged_at_its_own_precision(
    printed: str, unit: str, exact: Fraction, verdict: Verdict
) -> None:
    assert judge(printed, unit, exact) is verdict


SEQUENCE, IMAGE = AutoModelForSequenceClassification, AutoModelForImageClassification
TWO_STACKS = AutoModelForSeq2SeqLM
ENCODERS = {
    "roberta_base": (
        SEQUENCE,
        {
            "model_type": "roberta",
            "vocab_size": 50265,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
        },
    ),
    "roberta_large": (
        SEQUENCE,
        {
            "model_type": "roberta",
            "vocab_size": 50265,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    "deberta_xxl": (
        SEQUENCE,
        {
            "model_type": "deberta-v2",
            "hidden_size": 1536,
            "num_hidden_layers": 48,
            "num_attention_heads": 24,
            "intermediate_size": 6144,
        },
    ),
    "vit_base": (IMAGE, {"model_type": "vit"}),
    "mt0_large": (
        TWO_STACKS,
        {
            "model_type": "mt5",
            "vocab_size": 250112,
            "d_model": 1024,
            "d_ff": 2816,
            "d_kv": 64,
            "num_layers": 24,
            "num_heads": 16,
            "feed_forward_proj": "gated-gelu",
        },
    ),
}
HEAD_APART = ("mt0_large",)
"""Models whose head was counted apart from the embedding; transformers 5 ties the two."""


@pytest.mark.parametrize("name", ENCODERS)
def test_the_layer_tables_of_other_models_have_the_shapes_that_transformers_builds(
    name: str,
) -> None:
    auto, settings = ENCODERS[name]
    values = dict(settings)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = auto.from_config(config)
    table = read_json(PUBLISHED_COUNTS)["models"][name]["table"]
    blocks: dict[int, list[list[int]]] = {}
    for module_name, module in model.named_modules():
        block = block_of(module_name)
        if isinstance(module, torch.nn.Linear) and block is not None:
            blocks.setdefault(block, []).append([module.in_features, module.out_features])
    assert len(blocks) == table["blocks"]
    # Releases of transformers rename these layers; their order and shapes stay.
    wanted = list(table["block"].values())
    assert all(shapes[: len(wanted)] == wanted for shapes in blocks.values())
    if "base_parameters" in table:
        numbers = sum(p.numel() for p in model.parameters())
        if name in HEAD_APART:
            assert model.lm_head.weight is model.shared.weight
            numbers += model.lm_head.weight.numel()
        assert numbers == table["base_parameters"]
