"""OPT: learned positions, post-LN and a projected embedding in the 350m model."""

from __future__ import annotations

from collections.abc import Iterator

from loratune.models.architectures.base import (
    Family,
    Numbers,
    OtherModule,
    Part,
    embedding,
    layer_norm,
    linear,
    output_head,
)

# OPT's position table starts with two rows that no position uses.
_POSITION_OFFSET = 2


def _parts(numbers: Numbers) -> Iterator[Part]:
    width, vocabulary = numbers.size("hidden_size"), numbers.size("vocab_size")
    embedded = numbers.size("word_embed_proj_dim", width)
    positions = numbers.size("max_position_embeddings") + _POSITION_OFFSET
    affine = numbers.flag("layer_norm_elementwise_affine", True)
    pre_norm = numbers.flag("do_layer_norm_before", True)
    yield embedding("model.decoder.embed_tokens", vocabulary, embedded)
    yield OtherModule(
        "model.decoder.embed_positions", "OPTLearnedPositionalEmbedding", positions * width
    )
    if embedded != width:
        yield linear("model.decoder.project_out", width, embedded, bias=False)
        yield linear("model.decoder.project_in", embedded, width, bias=False)
    if pre_norm and not numbers.flag("_remove_final_layer_norm", False):
        yield from layer_norm("model.decoder.final_layer_norm", width, affine)
    for block in range(numbers.size("num_hidden_layers")):
        yield from _block(f"model.decoder.layers.{block}", numbers, width, affine)
    yield output_head(embedded, vocabulary)


def _block(prefix: str, numbers: Numbers, width: int, affine: bool) -> Iterator[Part]:
    bias, inner = numbers.flag("enable_bias", True), numbers.size("ffn_dim")
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        yield linear(f"{prefix}.self_attn.{name}", width, width, bias)
    yield from layer_norm(f"{prefix}.self_attn_layer_norm", width, affine)
    yield linear(f"{prefix}.fc1", width, inner, bias)
    yield linear(f"{prefix}.fc2", inner, width, bias)
    yield from layer_norm(f"{prefix}.final_layer_norm", width, affine)


OPT = Family(
    parts=_parts,
    tied_by_default=True,
)
