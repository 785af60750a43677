"""What tests over every registered variant ask of one, by its own word: none is named here."""

from __future__ import annotations

from typing import Any

from loratune.adapters.config import LayerKind, LayerShape
from loratune.adapters.registry import config_class, variant_names


def ranked(variant: str, rank: int) -> dict[str, int]:
    """The setting of a rank, for a variant that has one."""
    return {} if "rank" in config_class(variant).without_effect else {"rank": rank}


def adapts(variant: str, family: str) -> bool:
    """Whether the variant takes the layers of a family's models: linear ones, or Conv1D."""
    return not config_class(variant)().check_layer(_layer_of(family), 4)


def in_peft(variant: str, family: str) -> bool:
    """Whether PEFT has the variant for those layers too."""
    why_not = config_class(variant)().why_not_in_peft(_layer_of(family))
    return adapts(variant, family) and not why_not


def _layer_of(family: str) -> LayerShape:
    kind = LayerKind.conv1d if family == "gpt2" else LayerKind.linear
    return LayerShape("layer", kind, 32, 32)


def structures_in_peft() -> list[str]:
    """Variants whose files PEFT writes as well: one of each structure."""
    names = [name for name in variant_names() if "peft_type" in vars(config_class(name))]
    return [name for name in names if in_peft(name, "llama")]


def pefts_config(variant: str, target_modules: Any, **settings: Any) -> Any:
    """PEFT's configuration from what an adapter file of ours would hold."""
    from peft import get_peft_config

    own = config_class(variant)(**settings).to_peft()
    return get_peft_config({**own, "target_modules": target_modules, "task_type": "CAUSAL_LM"})
