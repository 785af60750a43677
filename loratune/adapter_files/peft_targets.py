"""How ``adapter_config.json`` names the adapted layers, so that PEFT adapts the same ones.

PEFT takes a name for every module that ends with it, takes some names of mixture-of-experts models
for their experts', and refuses some layers.  Where names of modules mislead it, the layers' weights
are named as ``target_parameters``; for PEFT an adapter of a linear layer's weight is the layer's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratune.adapters.config import LayerKind
from loratune.surgery import WrappedModel, peft_names
from loratune.targets.patterns import fitting_keys

_WEIGHT = ".weight"
_PATTERNS = ("rank_pattern", "alpha_pattern")
_LONGEST = 2000
"""Characters of a regular expression that loratune reads."""

# What PEFT 0.21 does with LoRA on models of transformers 5; nothing of it can be asked for.
_TAKEN_FOR_EXPERTS = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
"""Last names that become experts' tensors, by the family whose conversion of stored weights
transformers applies to the model (``_convert_peft_config_moe``)."""
_STATE_SPACE = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_REFUSED_THERE = frozenset({"out_proj", "conv1d"})
"""Model types, and last names that PEFT refuses in them (``_check_lora_target_modules_mamba``)."""


@dataclass(frozen=True)
class PeftTargets:
    """The settings that tell PEFT which layers are adapted.

    Attributes:
        settings: what ``adapter_config.json`` says of them.
        problem: why PEFT does not read the adapter right for all that; empty if it does.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def peft_targets(wrapped: WrappedModel, config: Mapping[str, Any]) -> PeftTargets:
    """The settings that make PEFT adapt exactly the adapted layers.

    Args:
        wrapped: the model.
        config: the other settings of ``adapter_config.json``.
    """
    refused = (wrapped.config.why_not_in_peft(one.shape) for one in wrapped.adapters.values())
    problem = next(filter(None, refused), "")
    if config.get("peft_type") != "LORA":
        modules, _ = _module_names(wrapped, list(wrapped.adapters))
        if wrapped.token_rows:
            problem = problem or "it trains rows of single tokens beside LoRA alone"
        return PeftTargets({"target_modules": modules}, problem)
    misread = _taken_for_experts(wrapped)
    stacked = [name for name, layer in wrapped.adapters.items() if layer.shape.is_stacked]
    modules, is_exact = _module_names(
        wrapped, [name for name in wrapped.adapters if name not in {*misread, *stacked}]
    )
    settings: dict[str, Any] = {"target_modules": modules}
    if misread or stacked:
        settings |= {
            "target_parameters": [*(name + _WEIGHT for name in misread), *stacked],
            "lora_dropout": 0.0,  # PEFT has no dropout in front of a parameter
            **{key: _with_parameters(config, key, misread) for key in _PATTERNS},
        }
    problem = problem or _problem(wrapped, misread, modules, is_exact=is_exact)
    for switch in sorted(wrapped.config.peft_switches) if misread else ():
        problem = problem or f"it has no {switch} for '{misread[0]}', which it takes for experts"
    return PeftTargets(settings, problem)


def as_modules(peft: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """An ``adapter_config.json`` with the weights of layers named as modules again.

    Args:
        peft: the file's content.
        facts: our own record of the adapter, which knows its dropout; empty for PEFT's own.
    """
    parameters = peft.get("target_parameters")
    if not isinstance(parameters, list) or not parameters:
        return dict(peft)
    if not all(isinstance(name, str) for name in parameters):
        return dict(peft)
    names = [name.removesuffix(_WEIGHT) for name in parameters]
    modules = peft.get("target_modules") or []
    joined = _any_of(modules, names) if isinstance(modules, str) else [*modules, *names]
    result = {**peft, "target_modules": joined, "target_parameters": None}
    for key in _PATTERNS:
        if isinstance(pattern := peft.get(key), dict):
            result[key] = {name: v for name, v in pattern.items() if name not in parameters}
    dropout = dict(facts.get("adapter") or {}).get("dropout")
    return result if dropout is None else {**result, "lora_dropout": dropout}


def _any_of(expression: str, names: Iterable[str]) -> str:
    named = "|".join(map(re.escape, names))
    return rf"(?:{expression})|(?:.*\.)?(?:{named})(?:{re.escape(_WEIGHT)})?"


def _module_names(wrapped: WrappedModel, adapted: Sequence[str]) -> tuple[list[str] | str, bool]:
    """The shortest ``target_modules`` for some layers, and whether it selects exactly those.

    Last names where they will do, else full names, else a regular expression: a full name that
    another module's ends with would select that one too.
    """
    names = [name for name, _ in wrapped.model.named_modules() if name]
    last_names = {name.rsplit(".", 1)[-1] for name in adapted}
    others = {name for name in names if name.rsplit(".", 1)[-1] in last_names}
    if others == set(adapted):
        return sorted(last_names), True
    strangers = others - set(adapted)
    if not any(name.endswith(f".{full}") for full in adapted for name in strangers):
        return sorted(adapted), True
    unclear = {name.rsplit(".", 1)[-1] for name in strangers}
    short = [rf"(?:.*\.)?{re.escape(last)}" for last in sorted(last_names - unclear)]
    full = [re.escape(name) for name in sorted(adapted) if name.rsplit(".", 1)[-1] in unclear]
    expression = "|".join([*short, *full])
    if len(expression) > _LONGEST:
        return sorted(adapted), False
    return expression, True


def _taken_for_experts(wrapped: WrappedModel) -> list[str]:
    """Adapted layers whose names PEFT takes for those of a mixture's experts."""
    from transformers import conversion_mapping

    families: Mapping[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    taken = _TAKEN_FOR_EXPERTS.get(families.get(_model_type(wrapped), ""), frozenset())
    return [
        name
        for name, layer in wrapped.adapters.items()
        if name.rsplit(".", 1)[-1] in taken and not layer.shape.is_stacked
    ]


def _with_parameters(
    config: Mapping[str, Any], key: str, modules: Sequence[str]
) -> dict[str, float]:
    """A rank or alpha pattern, said of the weights of ``modules`` as well."""
    patterns: dict[str, float] = dict(config.get(key) or {})
    fitting = fitting_keys(patterns, modules, key) if patterns else {}
    return {**patterns, **{name + _WEIGHT: patterns[used] for name, used in fitting.items()}}


def _problem(
    wrapped: WrappedModel, misread: Sequence[str], modules: list[str] | str, *, is_exact: bool
) -> str:
    kind = _model_type(wrapped)
    layers = {name: name.rsplit(".", 1)[-1] for name in wrapped.adapters}
    refused = sorted(set(layers.values()) & _REFUSED_THERE) if kind in _STATE_SPACE else []
    if refused:
        return f"it refuses adapters on {' and '.join(refused)} of models of type {kind}"
    other = next((n for n in misread if not _is_linear(wrapped, n)), None)
    if other is not None:
        return f"it takes '{other}' for a layer of experts"
    if not is_exact or (misread and isinstance(modules, str)):
        return "its target_modules have no way to name these layers and no others"
    renamed = _renamed_on_loading(wrapped)
    return f"it looks for the tensors of '{renamed}' under another name" if renamed else ""


def _is_linear(wrapped: WrappedModel, name: str) -> bool:
    return wrapped.adapters[name].shape.kind is LayerKind.linear


def _renamed_on_loading(wrapped: WrappedModel) -> str | None:
    """A layer whose tensors PEFT renames as transformers renames what old checkpoints hold.

    PEFT undoes it only where a name lost its beginning.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        get_model_conversion_mapping,
    )
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    model: Any = wrapped.model
    if not isinstance(model, PreTrainedModel):
        return None
    if get_checkpoint_conversion_mapping(_model_type(wrapped)) is None:
        return None
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    for name, written in peft_names(wrapped).items():
        key = f"{written}.lora_A{_WEIGHT}"
        if not key.endswith(rename_source_key(key, renamings, [])[0]):
            return name
    return None


def _model_type(wrapped: WrappedModel) -> str:
    return str(getattr(getattr(wrapped.model, "config", None), "model_type", ""))
