"""What the words of ``targets.modules`` mean in models of many families, read from structure."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loratune.adapters.config import LayerPlace
from loratune.config.schema import TargetsConfig
from loratune.errors import ModelError
from loratune.models.measure import layer_shapes, measure_model
from loratune.targets.find import TargetMatch, find_targets

SIZES: dict[str, Any] = {
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
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi3": {},
    "glm4": {"head_dim": 8},
    "gpt_neox": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"ffn_hidden_size": 48},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "nanochat": {},
    "apertus": {},
    "bert": {"is_decoder": True},
    "rembert": {"is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 24},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 96, "causal": True},
    "bart": {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "is_decoder": True,
    },
    "mixtral": {"num_local_experts": 2},
    "deepseek_v3": MLA
    | {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 20,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 20,
    },
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 20},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {},
    "rwkv": {"attention_hidden_size": 32},
    "gemma3": {
        "text_config": SIZES | {"head_dim": 8},
        "vision_config": VISION | {"vision_use_head": False},
        "mm_tokens_per_image": 4,
    },
}


@cache
def built(family: str) -> PreTrainedModel:
    own = MODELS[family]
    config = AutoConfig.for_model(family, **({} if "text_config" in own else SIZES) | own)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return model


def find(family: str, word: str) -> TargetMatch:
    measured = measure_model(built(family))
    return find_targets(
        measured.layers,
        TargetsConfig(modules=word),
        family=measured.family,
        others=measured.other_types,
        stacked=measured.stacked_experts,
        base_parameters=measured.base_parameters,
    )


@pytest.mark.parametrize("family", MODELS)
def test_all_linear_means_what_pefts_means_whatever_the_head_is_called(family: str) -> None:
    model = built(family)
    peft = _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), model)
    assert {shape.name for shape in find(family, "all_linear").shapes} == peft.target_modules


@pytest.mark.parametrize(
    ("family", "outside"),
    [("bert", "cls.predictions.transform.dense"), ("rembert", "cls.predictions.dense")],
)
def test_layers_outside_the_blocks_are_announced_without_the_head(
    family: str, outside: str
) -> None:
    [notice] = [line for line in find(family, "all_linear").notices if "outside" in line]
    assert outside in notice
    assert "cls.predictions.decoder" not in notice


def test_a_plain_module_has_no_output_head() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8))
    assert {shape.place for shape in layer_shapes(model)} == {LayerPlace.text}


MEANT = [
    ("phi3", "attention_qv", {"self_attn.qkv_proj": 2}),
    ("phi3", "attention", {"self_attn.qkv_proj": 2, "self_attn.o_proj": 2}),
    ("phi3", "mlp", {"mlp.gate_up_proj": 2, "mlp.down_proj": 2}),
    ("glm4", "mlp", {"mlp.gate_up_proj": 2, "mlp.down_proj": 2}),
    ("gpt_neox", "attention_qv", {"attention.query_key_value": 2}),
    ("gpt_neox", "attention", {"attention.query_key_value": 2, "attention.dense": 2}),
    ("gpt_neox", "mlp", {"mlp.dense_h_to_4h": 2, "mlp.dense_4h_to_h": 2}),
    ("bloom", "attention", {"self_attention.query_key_value": 2, "self_attention.dense": 2}),
    ("falcon", "attention_qv", {"self_attention.query_key_value": 2}),
    ("mpt", "attention", {"attn.Wqkv": 2, "attn.out_proj": 2}),
    ("mpt", "mlp", {"ffn.up_proj": 2, "ffn.down_proj": 2}),
    ("gptj", "attention_qv", {"attn.q_proj": 2, "attn.v_proj": 2}),
    ("gptj", "mlp", {"mlp.fc_in": 2, "mlp.fc_out": 2}),
    ("nanochat", "mlp", {"mlp.fc1": 2, "mlp.fc2": 2}),
    ("apertus", "mlp", {"mlp.up_proj": 2, "mlp.down_proj": 2}),
    ("bert", "attention_qv", {"attention.self.query": 2, "attention.self.value": 2}),
    ("bert", "mlp", {"intermediate.dense": 2, "output.dense": 2}),
    ("xlm", "attention_qv", {"q_lin": 2, "v_lin": 2}),
    ("xlm", "mlp", {"lin1": 2, "lin2": 2}),
    ("bart", "attention_qv", {"self_attn.q_proj": 2, "self_attn.v_proj": 2}),
    (
        "deepseek_v3",
        "attention_qv",
        {
            f"self_attn.{name}": 2
            for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
        },
    ),
    (
        "deepseek_v3",
        "mlp",
        {
            f"mlp.{part}{name}_proj": 1
            for part in ("", "shared_experts.")
            for name in ("gate", "up", "down")
        },
    ),
    (
        "qwen2_moe",
        "mlp",
        {f"mlp.shared_expert.{name}_proj": 2 for name in ("gate", "up", "down")},
    ),
    (
        "granitemoeshared",
        "mlp",
        {"shared_mlp.input_linear": 2, "shared_mlp.output_linear": 2},
    ),
    ("bamba", "attention_qv", {"self_attn.q_proj": 1, "self_attn.v_proj": 1}),
    ("lfm2", "mlp", {"feed_forward.w1": 2, "feed_forward.w2": 2, "feed_forward.w3": 2}),
    ("rwkv", "mlp", {"feed_forward.key": 2, "feed_forward.value": 2}),
    ("gemma3", "attention_qv", {"self_attn.q_proj": 2, "self_attn.v_proj": 2}),
    ("gemma3", "mlp", {"mlp.gate_proj": 2, "mlp.up_proj": 2, "mlp.down_proj": 2}),
]


@pytest.mark.parametrize(("family", "word", "expected"), MEANT)
def test_a_role_word_finds_the_layers_of_a_family_that_nobody_listed(
    family: str, word: str, expected: dict[str, int]
) -> None:
    match = find(family, word)
    assert match.counts == expected
    assert len(match.shapes) == sum(expected.values())
    assert all(shape.place is LayerPlace.text for shape in match.shapes)


def test_blocks_without_the_layers_are_counted() -> None:
    lines = find("bamba", "attention_qv").notices
    assert "attention_qv: 1 of 2 blocks have none" in lines
    assert "attention_qv: 1 of 2 blocks have none" in find("lfm2", "attention_qv").notices
    assert not any("blocks have" in line for line in find("llama", "attention_qv").notices)


def test_what_a_layer_holds_beside_what_was_asked_for_is_said() -> None:
    lines = find("deepseek_v3", "attention_qv").notices
    assert "attention_qv adapts self_attn.kv_b_proj, which holds key as well" in lines
    assert not any("as well" in line for line in find("deepseek_v3", "attention").notices)


def test_a_tower_is_not_meant_and_that_is_said() -> None:
    [line] = [line for line in find("gemma3", "mlp").notices if "tower" in line]
    assert "model.vision_tower.encoder.layers" in line
    assert {shape.place for shape in find("gemma3", "all_linear").shapes} == {
        LayerPlace.text, LayerPlace.tower,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "word"),
    [("mamba", "attention_qv"), ("mamba", "mlp"), ("mixtral", "mlp"), ("rwkv", "attention")],
)
def test_a_word_that_fits_no_layer_is_refused_with_those_that_exist(family: str, word: str) -> None:
    with pytest.raises(ModelError, match=f"what '{word}' means .* not known") as caught:
        find(family, word)
    assert "the model has" in caught.value.fix


def test_the_share_of_experts_out_of_reach_is_said_for_any_targets() -> None:
    model = built("mixtral")
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    share = experts / sum(parameter.numel() for parameter in model.parameters())
    [line] = [text for text in find("mixtral", "attention_qv").notices if "experts" in text]
    assert f"attention_qv leaves {experts:,} parameters of experts frozen, {share:.1%}" in line


def test_tensors_of_three_dimensions_are_not_experts_for_that_alone() -> None:
    assert measure_model(built("rwkv")).stacked_experts == {}
    assert measure_model(built("bamba")).stacked_experts == {}
