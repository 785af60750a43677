"""llama.cpp: what its ``convert_lora_to_gguf.py`` takes.

It reads the tensors, one ``lora_alpha`` for all layers, and the base's ``config.json``; the rank of
a layer is its tensors'.
"""

from __future__ import annotations

from loratune.verify.serving.rules import (
    ALPHA_PATTERNS,
    BIASES,
    MERGED,
    ROOT_SCALING,
    Rule,
    ServedAdapter,
    always,
    portable,
)

GGUF, GGUF_ADAPTER = "format=gguf", "format=gguf-lora"
_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_HEAD = ".lm_head."


def _other_tensors(adapter: ServedAdapter) -> str:
    other = [name for name in adapter.tensors if not name.endswith(_FACTORS)]
    return f"'{other[0]}' and {len(other) - 1} more are not lora_A or lora_B" if other else ""


def _as_factors(adapter: ServedAdapter) -> str:
    return GGUF_ADAPTER if adapter.export != MERGED else GGUF


def _adapts_head(adapter: ServedAdapter) -> bool:
    return any(_HEAD in name for name in adapter.tensors)


def _tied_head(adapter: ServedAdapter) -> str:
    if not (_adapts_head(adapter) and adapter.base.get("tie_word_embeddings")):
        return ""
    return "lm_head is adapted, and the base's head is its embedding"


def _architecture(adapter: ServedAdapter) -> str:
    if not adapter.base or adapter.base.get("architectures"):
        return ""
    return "the base's config.json names no architectures"


RULES = (
    Rule("tensors", _other_tensors, _as_factors),
    BIASES,
    ALPHA_PATTERNS,
    ROOT_SCALING,
    Rule("tied head", _tied_head, always(GGUF), needs_base=_adapts_head),
    Rule("architecture", _architecture, portable),
)
