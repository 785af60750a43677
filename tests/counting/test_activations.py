"""What autograd keeps for each variant, against the sizes that the mathematics asks for."""

from __future__ import annotations

from typing import Any

import pytest

from loratune.adapters.config import Kernel
from loratune.adapters.registry import config_class, variant_names
from loratune.config.schema import TargetsConfig
from loratune.counting.activations import ActivationReport, measure_activations
from loratune.errors import ModelError
from loratune.models.architectures import architecture_from_numbers
from loratune.models.measure import measure_numbers

WIDTH, OUT, INNER, RANK, FP32 = 32, 16, 48, 4, 4
NUMBERS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": WIDTH,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": INNER,
}
LLAMA = architecture_from_numbers(NUMBERS)


def measure(variant: str, modules: Any = "attention_qv", **settings: Any) -> ActivationReport:
    config = config_class(variant)(rank=RANK, **settings)
    return measure_activations(LLAMA, TargetsConfig(modules=modules), config, tokens=24)


def test_reference_lora_keeps_its_input_once_and_the_narrow_product_of_each_layer() -> None:
    report = measure("lora", kernel=Kernel.reference)
    assert report.added == FP32 * (WIDTH + 2 * RANK)
    assert sum(report.modules.values()) == report.added
    assert list(report.modules) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    ]


def test_reference_lora_fa_keeps_the_narrow_products_only() -> None:
    assert measure("lora_fa", kernel=Kernel.reference).added == FP32 * 2 * RANK


def test_lora_plus_keeps_what_lora_keeps() -> None:
    assert measure("lora_plus").added == measure("lora").added


def test_reference_vera_keeps_the_wide_product_of_each_layer_as_well() -> None:
    reference = measure("vera", kernel=Kernel.reference)
    assert reference.added >= FP32 * (WIDTH + OUT)
    assert measure("vera").added < reference.added


@pytest.mark.parametrize("variant", variant_names())
def test_the_fused_kernel_never_keeps_more_than_the_reference(variant: str) -> None:
    for dropout in (0.0, 0.1):
        fused = measure(variant, dropout=dropout, kernel=Kernel.fused)
        reference = measure(variant, dropout=dropout, kernel=Kernel.reference)
        assert fused.added <= reference.added
        assert fused.base == reference.base


def test_dropout_costs_the_reference_a_mask_of_the_input() -> None:
    still = measure("lora_fa", kernel=Kernel.reference)
    dropped = measure("lora_fa", kernel=Kernel.reference, dropout=0.1)
    assert dropped.added > still.added


def test_memory_grows_with_the_rank_only_by_the_narrow_product() -> None:
    narrow = measure("lora", "mlp")
    wide = measure_activations(
        LLAMA, TargetsConfig(modules="mlp"), config_class("lora")(rank=2 * RANK), tokens=24
    )
    assert wide.added - narrow.added == FP32 * 3 * RANK


def test_blocks_and_rank_patterns_of_other_blocks_do_not_matter() -> None:
    config = config_class("lora")(rank=RANK, rank_pattern={"layers.3.q_proj": 2, "v_proj": 8})
    targets = TargetsConfig(modules="attention_qv", layers=[3, 4])
    report = measure_activations(LLAMA, targets, config, tokens=24)
    assert report.added == FP32 * (WIDTH + RANK + 8)


def test_adapted_embeddings_and_heads_are_measured_too() -> None:
    report = measure("lora", ["lm_head", "q_proj"], kernel=Kernel.reference)
    assert report.modules["lm_head"] >= FP32 * RANK


def test_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(ModelError, match="c_attn"):
        measure("lora", ["c_attn"])


def test_measuring_leaves_torchs_random_state_alone() -> None:
    import torch

    before = torch.random.get_rng_state()
    measure("vera")
    assert torch.equal(before, torch.random.get_rng_state())


HYBRID: dict[str, Any] = {
    "model_type": "lfm2",
    "vocab_size": 300,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 6,
    "layer_types": ["conv", "conv", "full_attention"] * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NESTED: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        **{key: NUMBERS[key] for key in NUMBERS if key != "model_type"},
        "head_dim": 8,
        "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    },
    "mm_tokens_per_image": 4,
}


@pytest.mark.parametrize("numbers", [HYBRID, NESTED], ids=["hybrid", "nested"])
def test_blocks_of_several_kinds_and_nested_configs_are_measured(numbers: dict[str, Any]) -> None:
    config = config_class("lora")(rank=RANK, kernel=Kernel.reference)
    targets = TargetsConfig(modules=["self_attn.q_proj"])
    if numbers is NESTED:
        targets = TargetsConfig(modules="attention_qv")
    report = measure_activations(measure_numbers(numbers), targets, config, tokens=24)
    adapted = 2 if numbers is NESTED else 1  # one block of each kind that has the layer
    assert len({name.partition(".self_attn")[0] for name in report.modules}) == adapted
    assert report.added == FP32 * (WIDTH + (2 if numbers is NESTED else 1) * RANK)


def test_a_model_that_changes_its_embeddings_in_place_is_measured() -> None:
    """CTRL scales them so."""
    numbers = {
        "model_type": "ctrl", "vocab_size": 300, "n_embd": WIDTH, "dff": INNER, "n_layer": 2,
        "n_head": 4, "n_positions": 64,
    }  # fmt: skip
    targets = TargetsConfig(modules=["Wq"])
    config = config_class("lora")(rank=RANK, kernel=Kernel.reference)
    report = measure_activations(measure_numbers(numbers), targets, config, tokens=24)
    assert report.added == FP32 * (WIDTH + RANK)
