"""Llama and the families built like it: Mistral, Qwen2, Qwen3, Gemma."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loratune.models.architectures.base import (
    Family,
    Numbers,
    OtherModule,
    Part,
    embedding,
    linear,
    output_head,
)


@dataclass(frozen=True, slots=True)
class _Differences:
    """What sets one of these families apart.

    Attributes:
        norm: type of its norms.
        key_value_heads: heads of key and value where ``config.json`` names none (null: all).
        head_width: width of a head where ``config.json`` names none (null: hidden / heads).
        query_bias: whether query, key and value always have a bias; null asks ``attention_bias``.
        reads_mlp_bias: whether ``mlp_bias`` counts.
        normed_heads: whether query and key are normalised per head.
    """

    norm: str
    key_value_heads: int | None = None
    head_width: int | None = None
    query_bias: bool | None = None
    reads_mlp_bias: bool = False
    normed_heads: bool = False


def _parts_of(differences: _Differences) -> Callable[[Numbers], Iterator[Part]]:
    def parts(numbers: Numbers) -> Iterator[Part]:
        width, vocabulary = numbers.size("hidden_size"), numbers.size("vocab_size")
        yield embedding("model.embed_tokens", vocabulary, width)
        for block in range(numbers.size("num_hidden_layers")):
            prefix = f"model.layers.{block}"
            yield from _attention(f"{prefix}.self_attn", numbers, width, differences)
            yield from _mlp(f"{prefix}.mlp", numbers, width, differences)
            yield OtherModule(f"{prefix}.input_layernorm", differences.norm, width)
            yield OtherModule(f"{prefix}.post_attention_layernorm", differences.norm, width)
        yield OtherModule("model.norm", differences.norm, width)
        yield output_head(width, vocabulary)

    return parts


def _attention(
    prefix: str, numbers: Numbers, width: int, differences: _Differences
) -> Iterator[Part]:
    heads = numbers.size("num_attention_heads")
    head_width = numbers.size("head_dim", differences.head_width or width // heads)
    inner = heads * head_width
    shared = head_width * numbers.size("num_key_value_heads", differences.key_value_heads or heads)
    bias = output_bias = False
    if differences.query_bias is None:
        bias = output_bias = numbers.flag("attention_bias", False)
    else:
        bias = differences.query_bias
    yield linear(f"{prefix}.q_proj", width, inner, bias)
    yield linear(f"{prefix}.k_proj", width, shared, bias)
    yield linear(f"{prefix}.v_proj", width, shared, bias)
    yield linear(f"{prefix}.o_proj", inner, width, output_bias)
    if differences.normed_heads:
        yield OtherModule(f"{prefix}.q_norm", differences.norm, head_width)
        yield OtherModule(f"{prefix}.k_norm", differences.norm, head_width)


def _mlp(prefix: str, numbers: Numbers, width: int, differences: _Differences) -> Iterator[Part]:
    inner = numbers.size("intermediate_size")
    bias = differences.reads_mlp_bias and numbers.flag("mlp_bias", False)
    yield linear(f"{prefix}.gate_proj", width, inner, bias)
    yield linear(f"{prefix}.up_proj", width, inner, bias)
    yield linear(f"{prefix}.down_proj", inner, width, bias)


def _family(differences: _Differences, tied_by_default: bool = False) -> Family:
    return Family(_parts_of(differences), tied_by_default)


LLAMA = _family(_Differences("LlamaRMSNorm", reads_mlp_bias=True))
MISTRAL = _family(_Differences("MistralRMSNorm", key_value_heads=8, query_bias=False))
QWEN2 = _family(_Differences("Qwen2RMSNorm", key_value_heads=32, query_bias=True))
QWEN3 = _family(_Differences("Qwen3RMSNorm", key_value_heads=32, head_width=128, normed_heads=True))
GEMMA = _family(
    _Differences("GemmaRMSNorm", key_value_heads=16, head_width=256), tied_by_default=True
)
