"""Which modules play which role, per family."""

from __future__ import annotations

from collections.abc import Sequence

from loratune.adapters.config import LayerShape
from loratune.models.architectures.base import Family, Roles, names_module
from loratune.models.architectures.gpt2 import GPT2
from loratune.models.architectures.llama import GEMMA, LLAMA, MISTRAL, QWEN2, QWEN3
from loratune.models.architectures.opt import OPT

FAMILIES: dict[str, Family] = {
    "opt": OPT,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
}
"""``model_type`` to how its modules follow from its numbers; checked against transformers."""

ROLE_WORDS: dict[str, tuple[str, ...]] = {
    "attention_qv": ("query", "value"),
    "attention": ("query", "key", "value", "output"),
    "mlp": ("gate", "up", "down"),
}
"""Word of ``targets.modules`` to the roles it stands for (``all_linear`` goes by type)."""


def roles_of(
    family: str | None, layers: Sequence[LayerShape], wanted: Sequence[str] = ()
) -> Roles | None:
    """The roles of a family, or those of the first known family that fits these layers.

    A family fits if it names layers here for all of its roles that are ``wanted``.
    """
    if family in FAMILIES:
        return FAMILIES[family].roles
    for candidate in FAMILIES.values():
        suffixes = [candidate.roles[role] for role in wanted if role in candidate.roles]
        if suffixes and all(
            any(names_module(end, layer.name) for layer in layers) for end in suffixes
        ):
            return candidate.roles
    return None
