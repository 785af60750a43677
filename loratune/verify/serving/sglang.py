"""SGLang: what its ``LoRAConfig`` and ``LoRAAdapter`` (``sglang/srt/lora``) take.

They read ``peft_type``, ``target_modules``, ``r``, ``lora_alpha`` and ``use_dora``; the scaling is
lora_alpha / r, whatever else the file says.
"""

from __future__ import annotations

from loratune.verify.serving.rules import (
    BIASES,
    DORA,
    KIND,
    PATTERNS,
    ROOT_SCALING,
    SAVED_MODULES,
    TRAINED_TOKENS,
)

RULES = (KIND, DORA, BIASES, SAVED_MODULES, TRAINED_TOKENS, PATTERNS, ROOT_SCALING)
