"""GPT-2: Conv1D layers, query, key and value fused in one."""

from __future__ import annotations

from collections.abc import Iterator

from loratune.models.architectures.base import (
    Family,
    Numbers,
    Part,
    conv1d,
    embedding,
    layer_norm,
    output_head,
)


def _parts(numbers: Numbers) -> Iterator[Part]:
    numbers.require_unset("add_cross_attention", "GPT-2 with cross-attention is not a causal model")
    width, vocabulary = numbers.size("n_embd"), numbers.size("vocab_size")
    inner = numbers.size("n_inner", 4 * width)
    yield embedding("transformer.wte", vocabulary, width)
    yield embedding("transformer.wpe", numbers.size("n_positions"), width)
    for block in range(numbers.size("n_layer")):
        prefix = f"transformer.h.{block}"
        yield from layer_norm(f"{prefix}.ln_1", width)
        yield conv1d(f"{prefix}.attn.c_attn", width, 3 * width)
        yield conv1d(f"{prefix}.attn.c_proj", width, width)
        yield from layer_norm(f"{prefix}.ln_2", width)
        yield conv1d(f"{prefix}.mlp.c_fc", width, inner)
        yield conv1d(f"{prefix}.mlp.c_proj", inner, width)
    yield from layer_norm("transformer.ln_f", width)
    yield output_head(width, vocabulary)


GPT2 = Family(
    parts=_parts,
    tied_by_default=True,
)
