"""Tiny models whose files and modules do not agree in their names, one of each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from support.tiny_models import VOCABULARY

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
_VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def bert() -> Any:
    """The head's weight and its bias are both shared with other parameters."""
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    return BertLMHeadModel(BertConfig(**_SIZES, is_decoder=True))


def gemma3() -> Any:
    """A language model inside a model of images: every stored name differs from the module's."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    text = _SIZES | _GROUPED | {"layer_types": layers, "sliding_window": 4}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=_VISION, mm_tokens_per_image=4)
    )


def hrm_text() -> Any:
    """Query, key, value and gate are stored as one tensor and loaded as four."""
    from transformers import HrmTextConfig, HrmTextForCausalLM

    torch.manual_seed(0)
    return HrmTextForCausalLM(HrmTextConfig(**_SIZES, head_dim=8))


def zamba() -> Any:
    """Two of the blocks share the layers of attention and MLP, stored once."""
    from transformers import ZambaConfig, ZambaForCausalLM

    torch.manual_seed(0)
    kinds = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
    sizes = _SIZES | {"num_hidden_layers": 4, "num_key_value_heads": 2}
    return ZambaForCausalLM(
        ZambaConfig(
            **sizes, attention_hidden_size=32, attention_head_dim=16, n_mamba_heads=2,
            mamba_d_state=4, mamba_dt_rank=2, layers_block_type=kinds,
        )
    )  # fmt: skip


def deepseek_v3() -> Any:
    """A mixture of experts with layers called ``gate_proj`` that are not experts."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_SIZES, num_key_value_heads=2, moe_intermediate_size=8, n_shared_experts=1,
            n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            first_k_dense_replace=1, q_lora_rank=4, kv_lora_rank=4, qk_rope_head_dim=4,
            qk_nope_head_dim=4, v_head_dim=8, num_nextn_predict_layers=0,
        )
    )  # fmt: skip


def mixtral() -> Any:
    """A mixture whose experts are stored one by one and loaded as two stacks."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(**_SIZES, **_GROUPED, num_local_experts=3, num_experts_per_tok=2)
    )


def qwen3_moe() -> Any:
    """A mixture with a width of its own for the experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_SIZES, **_GROUPED, moe_intermediate_size=12, num_experts=3, num_experts_per_tok=2
        )
    )


def gpt_oss() -> Any:
    """A mixture whose stacked experts are transposed, and stored as they are loaded."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    return GptOssForCausalLM(
        GptOssConfig(**_SIZES, **_GROUPED, num_local_experts=3, num_experts_per_tok=2)
    )


def jetmoe() -> Any:
    """Experts in the attention as well; each stack is called ``weight``."""
    from transformers import JetMoeConfig, JetMoeForCausalLM

    torch.manual_seed(0)
    sizes = {key: value for key, value in _SIZES.items() if key != "num_attention_heads"}
    return JetMoeForCausalLM(
        JetMoeConfig(
            **sizes, num_key_value_heads=2, kv_channels=8, num_local_experts=3,
            num_experts_per_tok=2,
        )
    )  # fmt: skip


def laguna() -> Any:
    """A mixture whose shared experts are stored under another name."""
    from transformers import LagunaConfig, LagunaForCausalLM

    torch.manual_seed(0)
    return LagunaForCausalLM(
        LagunaConfig(
            **_SIZES, **_GROUPED, moe_intermediate_size=8, shared_expert_intermediate_size=8,
            num_experts=4, num_experts_per_tok=2, sliding_window=8,
        )
    )  # fmt: skip


def git() -> Any:
    """The head is called ``output``, as layers inside the blocks are."""
    from transformers import GitConfig, GitForCausalLM

    torch.manual_seed(0)
    return GitForCausalLM(GitConfig(**_SIZES, vision_config=_VISION))


def mamba() -> Any:
    """A state-space model."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {key: value for key, value in _SIZES.items() if key != "num_attention_heads"}
    return MambaForCausalLM(MambaConfig(**sizes, state_size=4, time_step_rank=2))


def qwen3_5() -> Any:
    """A model of images and text; as a causal model transformers loads its text alone."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    torch.manual_seed(0)
    kinds = ["linear_attention", "full_attention"]
    text = _SIZES | _GROUPED | {
        "layer_types": kinds, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 16, "num_position_embeddings": 16,
    }  # fmt: skip
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision))


BUILDERS: dict[str, Callable[[], Any]] = {
    "bert": bert,
    "gemma3": gemma3,
    "hrm_text": hrm_text,
    "zamba": zamba,
    "deepseek_v3": deepseek_v3,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
    "jetmoe": jetmoe,
    "laguna": laguna,
    "git": git,
    "mamba": mamba,
    "qwen3_5": qwen3_5,
}
