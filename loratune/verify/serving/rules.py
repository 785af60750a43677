"""One rule of a server: what an adapter must not have, and the export that satisfies it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

PORTABLE, MERGED = "format=portable", "format=merged"


@dataclass(frozen=True)
class ServedAdapter:
    """What a server's loader reads of an adapter.

    Attributes:
        peft: ``adapter_config.json``.
        tensors: names in the adapter's file.
        base: the base model's ``config.json``; empty where nobody knows the base.
        is_low_rank: whether every correction is a product of two factors, so that plain LoRA
            holds it.
    """

    peft: Mapping[str, Any]
    tensors: tuple[str, ...] = ()
    base: Mapping[str, Any] = field(default_factory=dict)
    is_low_rank: bool = True

    @property
    def largest_rank(self) -> int:
        """The largest rank of any layer."""
        own = [int(self.peft.get("r") or 0), *(self.peft.get("rank_pattern") or {}).values()]
        return max(int(rank) for rank in own)

    @property
    def saved_modules(self) -> list[str]:
        """Modules trained in full."""
        return [str(name) for name in self.peft.get("modules_to_save") or []]

    @property
    def export(self) -> str:
        """The export that every server reads: plain LoRA where that holds the adapter."""
        whole = self.saved_modules or self.peft.get("trainable_token_indices")
        return MERGED if whole or not self.is_low_rank else PORTABLE


@dataclass(frozen=True)
class Rule:
    """A rule of one server.

    Attributes:
        subject: what it is about, a few words.
        broken_by: what the adapter has that the server does not take, or an empty string.
        fix: the words after ``loratune export run=DIR``, or a whole sentence.
        needs_base: whether it can be checked only with the base's ``config.json``.
    """

    subject: str
    broken_by: Callable[[ServedAdapter], str]
    fix: Callable[[ServedAdapter], str]
    needs_base: Callable[[ServedAdapter], bool] = lambda adapter: False


def always(words: str) -> Callable[[ServedAdapter], str]:
    """The same fix for every adapter."""
    return lambda adapter: words


def merged(adapter: ServedAdapter) -> str:
    """The export without an adapter."""
    return MERGED


def portable(adapter: ServedAdapter) -> str:
    """The export as plain LoRA, where that holds the adapter."""
    return adapter.export


# -- what several servers do not take ------------------------------------------------------


def other_kind(adapter: ServedAdapter) -> str:
    """A kind of adapter other than LoRA."""
    kind = adapter.peft.get("peft_type")
    return "" if kind == "LORA" else f"peft_type is {kind}; only LORA is loaded"


def weight_decomposed(adapter: ServedAdapter) -> str:
    """DoRA's norms."""
    return "use_dora is true" if adapter.peft.get("use_dora") else ""


def biases(adapter: ServedAdapter) -> str:
    """Trained biases."""
    bias = adapter.peft.get("bias") or "none"
    return "" if bias == "none" else f"bias is {bias}"


def saved_modules(adapter: ServedAdapter) -> str:
    """Modules trained in full."""
    return f"modules_to_save: {', '.join(adapter.saved_modules)}" if adapter.saved_modules else ""


def trained_tokens(adapter: ServedAdapter) -> str:
    """Single rows of embeddings."""
    trained = adapter.peft.get("trainable_token_indices")
    return "trainable_token_indices: rows of embeddings were trained" if trained else ""


def patterns(adapter: ServedAdapter) -> str:
    """Ranks and alphas that differ between layers, where only the global ones are read."""
    names = [name for name in ("rank_pattern", "alpha_pattern") if adapter.peft.get(name)]
    return f"{' and '.join(names)}: only r and lora_alpha are read" if names else ""


def alpha_patterns(adapter: ServedAdapter) -> str:
    """Alphas that differ between layers, where the ranks are the tensors'."""
    differs = adapter.peft.get("alpha_pattern")
    return "alpha_pattern: one lora_alpha is read for all layers" if differs else ""


def root_scaling(adapter: ServedAdapter) -> str:
    """Scaling by the root of the rank, where the server divides by the rank."""
    if not adapter.peft.get("use_rslora"):
        return ""
    return "use_rslora is true, and lora_alpha is divided by the rank, not by its root"


# -- rules that several servers share ------------------------------------------------------

KIND = Rule("kind of adapter", other_kind, portable)
DORA = Rule("DoRA", weight_decomposed, merged)
BIASES = Rule("biases", biases, always("train it again with bias=none: PEFT alone reads them"))
SAVED_MODULES = Rule("modules trained in full", saved_modules, merged)
TRAINED_TOKENS = Rule("rows of embeddings", trained_tokens, merged)
PATTERNS = Rule("patterns", patterns, portable)
ALPHA_PATTERNS = Rule("patterns", alpha_patterns, portable)
ROOT_SCALING = Rule("rsLoRA", root_scaling, portable)
