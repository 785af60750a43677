"""Counts against PEFT, against worked examples, and against the adapters' own tensors."""

from __future__ import annotations

import ast
import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from loratune.adapters.config import LayerKind, LayerShape
from loratune.adapters.lora.config import LoRAConfig
from loratune.adapters.registry import config_class, variant_names
from loratune.adapters.vera.config import VeRAConfig
from loratune.config.schema import TargetsConfig
from loratune.counting.budget import Budget, match_budget, parse_budget
from loratune.counting.parameters import ParameterReport, VariantCount, count_variants
from loratune.counting.published import published_report
from loratune.counting.tables import budget_table, module_table, published_table, variant_table
from loratune.counting.variant_table import variant_configs
from loratune.errors import ConfigError, LoratuneError, ModelError
from loratune.files import to_json
from loratune.models.architectures import Architecture, architecture_from_numbers
from loratune.targets.find import find_targets

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": 50272,
    "num_attention_heads": 1,
    "max_position_embeddings": 2048,
}
OPTS: dict[str, dict[str, Any]] = {
    "125m": {"hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072},
    "350m": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "ffn_dim": 4096,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    },
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "ffn_dim": 8192},
}


def opt(size: str) -> Architecture:
    return architecture_from_numbers(OPT | OPTS[size])


def matched(architecture: Architecture, modules: Any = "attention_qv") -> tuple[LayerShape, ...]:
    targets = TargetsConfig(modules=modules)
    return find_targets(architecture.layers, targets, family=architecture.family).shapes


def report_for(
    architecture: Architecture, rank: int, modules: Any = "attention_qv", **more: Any
) -> ParameterReport:
    configs = [config_class(name)(rank=rank) for name in variant_names()]
    return count_variants(architecture, matched(architecture, modules), configs, **more)


def by_variant(report: ParameterReport) -> dict[str, VariantCount]:
    return {row.variant: row for row in report.variants}


@pytest.mark.parametrize(
    ("size", "base", "lora", "lora_fa", "vera"),
    [
        ("125m", 125_239_296, 589_824, 294_912, 18_816),
        ("350m", 331_196_416, 1_572_864, 786_432, 49_920),
        ("1.3b", 1_315_758_080, 3_145_728, 1_572_864, 99_072),
    ],
)
def test_opt_at_rank_16_on_query_and_value(
    size: str, base: int, lora: int, lora_fa: int, vera: int
) -> None:
    report = report_for(opt(size), 16)
    counts = {name: row.trainable for name, row in by_variant(report).items()}
    assert report.base_parameters == base
    dora = lora + sum(layer.out_features for layer in matched(opt(size)))
    named = {"lora": lora, "lora_plus": lora, "lora_fa": lora_fa, "vera": vera, "dora": dora}
    assert {**counts, **named} == counts


def test_a_layer_of_1000_by_1000_at_rank_8() -> None:
    layer = LayerShape("layer", LayerKind.linear, 1000, 1000, 1_000_000)
    square = Architecture("square", (layer,), (), 1_000_000, {})
    configs = [config_class(name)(rank=8) for name in ("lora", "lora_fa", "lora_plus", "vera")]
    report = count_variants(square, [layer], configs)
    assert [row.trainable for row in report.variants] == [16_000, 8_000, 16_000, 1_008]
    assert [row.frozen for row in report.variants] == [0, 8_000, 0, 16_000]
    assert [row.stored for row in report.variants] == [16_000, 16_000, 16_000, 17_008]
    assert [row.stored_bytes for row in report.variants] == [64_000, 64_000, 64_000, 68_032]
    assert [row.optimizer_bytes for row in report.variants] == [128_000, 64_000, 128_000, 8_064]


def test_percentages_name_their_denominators() -> None:
    rows = by_variant(report_for(opt("125m"), 16))
    assert rows["lora"].percent_of_base == pytest.approx(0.470958, abs=1e-6)
    assert rows["lora"].percent_of_total == pytest.approx(0.468750, abs=1e-6)
    assert rows["lora_fa"].percent_of_base == pytest.approx(0.235479, abs=1e-6)
    assert rows["vera"].total == 125_239_296 + 18_816


def peft_counts(settings: Any) -> tuple[int, int]:
    """Trainable and all parameters, as PEFT counts them."""
    values = dict(LLAMA)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), settings)
    trainable, total = model.get_nb_trainable_parameters()
    return int(trainable), int(total)


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["down_proj"], ["k_proj", "up_proj"]])
@pytest.mark.parametrize("saved", [[], ["lm_head"], ["model.norm", "embed_tokens"]])
def test_counts_and_percentages_equal_pefts(modules: list[str], saved: list[str]) -> None:
    llama = architecture_from_numbers(LLAMA)
    rows = by_variant(report_for(llama, 4, modules, modules_to_save=saved))
    common = {"r": 4, "target_modules": modules, "modules_to_save": saved}
    lora = peft_counts(LoraConfig(**common))
    vera = peft_counts(VeraConfig(**common))
    assert (rows["lora"].trainable, rows["lora"].total) == lora
    assert (rows["vera"].trainable, rows["vera"].total) == vera
    assert rows["lora_fa"].total == lora[1]
    assert rows["lora"].percent_of_total == 100 * lora[0] / lora[1]


@pytest.mark.parametrize("variant", variant_names())
@pytest.mark.parametrize(
    "modules", [["q_proj", "v_proj"], "all_linear", ["k_proj", "down_proj", "lm_head"]]
)
def test_closed_forms_equal_the_tensors_of_a_wrapped_model(variant: str, modules: Any) -> None:
    from loratune.surgery import adapter_state, wrap_model

    values = dict(LLAMA)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    settings = config_class(variant)(rank=3)
    architecture = architecture_from_numbers(LLAMA)
    model = AutoModelForCausalLM.from_config(config)
    wrapped = wrap_model(model, settings, TargetsConfig(modules=modules))
    row = count_variants(architecture, matched(architecture, modules), [settings]).variants[0]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = adapter_state(wrapped)
    assert row.trainable == trainable
    assert row.stored == sum(tensor.numel() for tensor in state.values())
    assert row.stored_bytes == sum(t.numel() * t.element_size() for t in state.values())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert row.optimizer_bytes == sum(m.numel() * m.element_size() for m in moments)


def test_module_rows_and_shared_matrices_add_up() -> None:
    for row in report_for(architecture_from_numbers(LLAMA), 4, "all_linear").variants:
        assert sum(module.trainable for module in row.modules) == row.trainable
        assert sum(module.frozen for module in row.modules) + row.shared == row.frozen


def test_rank_patterns_change_their_layers_only() -> None:
    llama = architecture_from_numbers(LLAMA)
    config = LoRAConfig(rank=4, rank_pattern={"layers.1.q_proj": 1, r".*layers\.1.*q_proj": 8})
    row = count_variants(llama, matched(llama), [config]).variants[0]
    assert [module.rank for module in row.modules] == [4, 4, 8, 4]
    assert row.trainable == 4 * 64 + 4 * 48 + 8 * 64 + 4 * 48


def test_vera_without_stored_matrices_stores_what_it_trains() -> None:
    llama = architecture_from_numbers(LLAMA)
    config = VeRAConfig(rank=4)
    kept, dropped = count_variants(
        llama, matched(llama), [config, replace(config, save_projection=False)]
    ).variants
    assert kept.stored - dropped.stored == kept.shared == 4 * (32 + 32)
    assert dropped.stored == dropped.trainable


def test_a_smaller_number_format_halves_the_file_only() -> None:
    llama = architecture_from_numbers(LLAMA)
    full, half = (by_variant(report_for(llama, 4, bytes_per_number=n))["lora"] for n in (4, 2))
    assert full.stored_bytes == 2 * half.stored_bytes
    assert full.optimizer_bytes == half.optimizer_bytes


def test_a_module_to_save_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ModelError, match="'lm_hed'") as caught:
        report_for(architecture_from_numbers(LLAMA), 4, modules_to_save=["lm_hed"])
    assert "lm_head" in caught.value.fix


# -- budgets -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["trainable:589824", "trainable:100K", "bytes:1MB", "bytes:1"])
@pytest.mark.parametrize("size", ["125m", "350m"])
def test_the_matched_rank_is_the_highest_within_the_budget(text: str, size: str) -> None:
    architecture = opt(size)
    layers = matched(architecture)
    configs = [config_class(name)() for name in variant_names()]
    budget = parse_budget(text)

    def spent(variant: str, rank: int) -> int:
        config = config_class(variant)(rank=rank)
        return budget.spent(count_variants(architecture, layers, [config]).variants[0])

    for match in match_budget(architecture, layers, configs, budget):
        if match.rank is None:
            assert spent(match.variant, 1) == match.reached > budget.limit
            assert "impossible" in match.note
        else:
            assert spent(match.variant, match.rank) == match.reached <= budget.limit
            if "rank" in config_class(match.variant).without_effect:
                assert "does not depend on the rank" in match.note
            else:
                assert spent(match.variant, match.rank + 1) > budget.limit
        assert match.difference == match.reached - budget.limit


def test_lora_fa_reaches_loras_count_at_twice_its_rank() -> None:
    architecture = opt("125m")
    configs = [config_class(name)() for name in ("lora", "lora_fa", "vera")]
    budget = Budget("trainable", 589_824)
    lora, lora_fa, vera = match_budget(architecture, matched(architecture), configs, budget)
    assert (lora.rank, lora_fa.rank) == (16, 32)
    assert lora.difference == lora_fa.difference == 0
    assert vera.rank == 589_824 // 24 - 768
    assert "768" in vera.note
    assert not lora.note


def test_a_budget_chooses_no_rank_that_a_layer_cannot_have() -> None:
    """MiSS repeats a shard of rank inputs: q_proj of OPT-125m has no more than 768."""
    architecture = opt("125m")
    budget = Budget("trainable", 10**9)
    (miss,) = match_budget(architecture, matched(architecture), [config_class("miss")()], budget)
    assert miss.rank == 768 and miss.reached == 24 * 768 * 768
    assert "there are 768" in miss.note
    above = config_class("miss")(rank=769)
    with pytest.raises(LoratuneError, match="there are 768"):
        find_targets(architecture.layers, TargetsConfig(modules="attention_qv"), above, "opt")


def test_where_nothing_fits_only_a_variant_with_ranks_is_told_of_one() -> None:
    architecture = opt("125m")
    configs = [config_class(name)() for name in ("lora", "full")]
    lora, full = match_budget(
        architecture, matched(architecture), configs, Budget("trainable", 100)
    )
    assert lora.least == "rank 1 takes 36,864" and lora.rank is None
    assert full.least == f"it takes {24 * 768 * 768:,} as it is set" and full.rank is None


@pytest.mark.parametrize("name", ["vera", "miss"])
def test_patterns_of_the_chosen_adapter_go_to_no_variant_without_them(
    name: str, tmp_path: Path
) -> None:
    """The user's own recipe gives the variant LoRA's usual rank, which it then follows."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / f"adapter/{name}.yaml").write_text("rank: 8\n")
    chosen = LoRAConfig(rank=4, rank_pattern={"q_proj": 2})
    by_name = {c.variant: c for c in variant_configs(chosen, folders=[tmp_path])}
    assert by_name[name].rank == 4 and not by_name[name].rank_pattern
    assert by_name["dora"].rank_pattern == {"q_proj": 2}
    assert by_name["full"].useless_settings() == []


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("trainable:589824", 589_824),
        ("trainable:589,824", 589_824),
        ("trainable:9.2M", 9_200_000),
        ("bytes:6MB", 6_000_000),
        ("bytes:6MiB", 6 * 1024 * 1024),
        ("bytes:512", 512),
    ],
)
def test_budgets_are_read_with_units(text: str, limit: int) -> None:
    assert parse_budget(text).limit == limit


@pytest.mark.parametrize("text", ["", "589824", "rank:3", "trainable:", "trainable:0", "bytes:6XB"])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_budget(text)
    assert caught.value.where == "match"


# -- tables --------------------------------------------------------------------------------


def test_the_tables_hold_the_counts() -> None:
    report = report_for(opt("125m"), 16)
    markdown = variant_table(report.to_dict()).to_markdown()
    assert "| lora | 16 | 589,824 | 0 | 589,824 | 2,359,296 | 4,718,592 | 0.471 |" in markdown
    assert "125,239,296 base parameters" in markdown
    rows = list(csv.DictReader(io.StringIO(variant_table(report.to_dict()).to_csv())))
    assert {row["variant"]: int(row["trainable"]) for row in rows}["vera"] == 18_816
    variants = json.loads(to_json(report.to_dict()))["variants"]
    assert {row["variant"]: row["trainable"] for row in variants}["lora"] == 589_824
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(variant_table(report.to_dict()).to_rich())
    assert "589,824" in console.export_text()


def test_the_module_table_adds_up_to_the_variants() -> None:
    report = report_for(opt("125m"), 16)
    rows = list(csv.DictReader(io.StringIO(module_table(report).to_csv())))
    for variant in report.variants:
        own = [row for row in rows if row["variant"] == variant.variant]
        assert sum(int(row["trainable"]) for row in own) == variant.trainable
        assert sum(int(row["frozen in adapter"]) for row in own) == variant.frozen


def test_names_in_a_table_are_never_read_as_markup() -> None:
    layer = LayerShape("[/red]layer|x", LayerKind.linear, 4, 4, 16)
    square = Architecture("[bold]", (layer,), (), 16, {})
    report = count_variants(square, [layer], [LoRAConfig(rank=1)])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(module_table(report).to_rich(), variant_table(report.to_dict()).to_rich())
    text = console.export_text()
    assert "[/red]layer" in text
    assert "[bold]" in text
    assert r"[/red]layer\|x" in module_table(report).to_markdown()


def test_budgets_and_published_counts_have_tables() -> None:
    architecture = opt("125m")
    budget = Budget("trainable", 100)
    matches = match_budget(architecture, matched(architecture), [LoRAConfig()], budget)
    assert "| lora | none | 36,864 | 36,764 |" in budget_table(matches).to_markdown()
    published = published_table(published_report()).to_markdown()
    assert published.count("\n| ") == len(published_report()) + 2
    assert "not reproducible" in published


def test_a_count_from_numbers_answers_without_torch() -> None:
    script = (
        "import sys\n"
        "from loratune.models.architectures import architecture_from_numbers\n"
        "from loratune.counting.parameters import count_variants\n"
        "from loratune.targets.find import find_targets\n"
        "from loratune.config.schema import TargetsConfig\n"
        "from loratune.adapters.registry import config_class, variant_names\n"
        f"opt = architecture_from_numbers({OPT | OPTS['125m']})\n"
        "found = find_targets(opt.layers, TargetsConfig(), family='opt').shapes\n"
        "configs = [config_class(name)(rank=16) for name in variant_names()]\n"
        "rows = count_variants(opt, found, configs).variants\n"
        "print({row.variant: row.trainable for row in rows})\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    counts = ast.literal_eval(done.stdout or "{}")
    named = {"lora": 589824, "lora_fa": 294912, "lora_plus": 589824, "vera": 18816}
    assert {**counts, **named} == counts, done.stderr
