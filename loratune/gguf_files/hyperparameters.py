"""A model's sizes and constants as the keys that llama.cpp reads."""

from __future__ import annotations

from typing import Any

from gguf import GGUFWriter, RopeScalingType

from loratune.gguf_files.architectures import Architecture
from loratune.gguf_files.rope import Rope


def add_hyperparameters(
    writer: GGUFWriter, config: Any, architecture: Architecture, rope: Rope, rows: int
) -> None:
    """Write sizes, norm, rotary positions and windows.

    Args:
        writer: of the file.
        config: the model's, as transformers understands it.
        architecture: its graph in llama.cpp.
        rope: its rotary positions.
        rows: of the embeddings, with the adapter in the model.
    """
    writer.add_vocab_size(rows)
    writer.add_context_length(context_length(config, architecture))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    size = head_size(config)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope.base)
    if rope.linear != 1.0:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.linear)
    if architecture.window is not None:
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base_swa(rope.base if rope.window_base is None else rope.window_base)
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if key in architecture.reads and getattr(config, key):
            add(getattr(config, key))


def head_size(config: Any) -> int:
    """Numbers of one attention head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def context_length(config: Any, architecture: Architecture) -> int:
    """Positions of the model; a window that the graph does not have ends them."""
    window = getattr(config, "sliding_window", None)
    if architecture.window is None and "sliding_window" in architecture.reads and window:
        return min(int(window), int(config.max_position_embeddings))
    return int(config.max_position_embeddings)
