"""Ollama: what ``ADAPTER FOLDER`` in a Modelfile takes (``convert/convert.go``).

A GGUF file is run as it is; a folder in PEFT's format is converted, for two architectures, with
``lora_alpha`` alone, which must be a whole number.
"""

from __future__ import annotations

from loratune.verify.serving.llama_cpp import GGUF, GGUF_ADAPTER
from loratune.verify.serving.rules import (
    ALPHA_PATTERNS,
    BIASES,
    DORA,
    KIND,
    MERGED,
    ROOT_SCALING,
    SAVED_MODULES,
    TRAINED_TOKENS,
    Rule,
    ServedAdapter,
    portable,
)

_MODEL_TYPES = ("llama", "gemma2", "mistral")
"""Bases whose GGUF file says ``llama`` or ``gemma2``: others' adapters are not converted."""


def _architecture(adapter: ServedAdapter) -> str:
    kind = adapter.base.get("model_type")
    if not kind or kind in _MODEL_TYPES:
        return ""
    return f"the base is {kind}: folders are converted for {', '.join(_MODEL_TYPES)} alone"


def _as_file(adapter: ServedAdapter) -> str:
    return GGUF if adapter.export == MERGED else GGUF_ADAPTER


def _fraction(adapter: ServedAdapter) -> str:
    alpha = adapter.peft.get("lora_alpha")
    whole = alpha is None or float(alpha).is_integer()
    return "" if whole else f"lora_alpha is {alpha}, and must be a whole number"


RULES = (
    KIND,
    DORA,
    BIASES,
    SAVED_MODULES,
    TRAINED_TOKENS,
    ALPHA_PATTERNS,
    ROOT_SCALING,
    Rule("lora_alpha", _fraction, portable),
    Rule("architecture", _architecture, _as_file, needs_base=lambda adapter: True),
)
