"""vLLM: what its reader of ``adapter_config.json`` (``vllm/lora/peft_helper.py``) takes.

It knows ``r``, ``lora_alpha``, ``target_modules``, ``bias``, ``modules_to_save``, ``use_rslora``
and ``use_dora``; other settings are dropped without a word.
"""

from __future__ import annotations

from loratune.verify.serving.rules import (
    BIASES,
    DORA,
    KIND,
    MERGED,
    PATTERNS,
    TRAINED_TOKENS,
    Rule,
    ServedAdapter,
    merged,
)

RANK = "rank"
"""Subject of the rule that an option of the server changes."""
LARGEST_RANK = 16
"""``max_lora_rank`` unless the server is started with another."""
_HEADS = ("classifier", "score")
"""Modules trained in full that it takes: heads of classification."""


def _saved_modules(adapter: ServedAdapter) -> str:
    other = [name for name in adapter.saved_modules if name not in _HEADS]
    return f"modules_to_save: {', '.join(other)}" if other else ""


def _rank(adapter: ServedAdapter) -> str:
    rank = adapter.largest_rank
    return f"rank {rank} is over {LARGEST_RANK}, max_lora_rank" if rank > LARGEST_RANK else ""


def _larger_rank(adapter: ServedAdapter) -> str:
    return f"start it with --max-lora-rank {adapter.largest_rank}, or {MERGED}"


RULES = (
    KIND,
    DORA,
    BIASES,
    Rule("modules trained in full", _saved_modules, merged),
    TRAINED_TOKENS,
    Rule(RANK, _rank, _larger_rank),
    PATTERNS,
)
