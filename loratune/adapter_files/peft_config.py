"""Our settings from PEFT's ``adapter_config.json``: a file by a stranger, read without trust."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from loratune.adapters.config import AdapterConfig
from loratune.adapters.registry import config_class, variant_names
from loratune.config.schema import TargetsConfig
from loratune.errors import LoratuneError, ModelError, SecurityError, raise_together

CONFIG = "adapter_config.json"
RESTORE_CONFIG = "restore the adapter_config.json that belongs to the tensors"
# Settings of an adapter_config.json that change the mathematics and that loratune has not.
_UNSUPPORTED = (
    "use_dora", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "megatron_config", "velora_config", "use_bdlora",
    "monteclora_config", "kasa_config", "arrow_config", "ensure_weight_tying",
)  # fmt: skip

# Starts after which the base is still the base, so that the saved factors are all there is.
_STARTS_FROM_THE_BASE = ("gaussian", "orthogonal", "eva", "mica", "true")


def configs_from_peft(
    peft: Mapping[str, Any], facts: Mapping[str, Any], folder: Path
) -> tuple[AdapterConfig, TargetsConfig]:
    """Our settings from ``adapter_config.json``, completed by ``loratune.json`` where it is there.

    Raises:
        ModelError: for a kind of adapter, or a setting, that loratune does not have.
        SecurityError: for paths and libraries that a configuration has no business naming.
    """
    where = str(folder / CONFIG)
    _refuse_unsupported(peft, where)
    variant = str(facts.get("variant") or _plain_variant(peft, where))
    try:
        config = config_class(variant).from_peft(peft, dict(facts.get("adapter", {})))
    except LoratuneError as error:
        raise unusable_setting(error, where) from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelError(
            f"unusable adapter setting: {error}", where=where, fix=RESTORE_CONFIG
        ) from error
    targets = peft.get("target_modules")
    if not isinstance(targets, (str, list)) or not targets:
        raise ModelError("the adapter names no target modules", where=where)
    layers = _layer_numbers(peft.get("layers_to_transform"), where)
    modules: str | list[str] = targets if isinstance(targets, str) else [str(t) for t in targets]
    exclude = peft.get("exclude_modules") or []
    if isinstance(exclude, str):
        modules, exclude = _without_matches(modules, exclude), []
    return config, TargetsConfig(
        modules=modules,
        exclude=[str(name) for name in exclude],
        layers=layers,
        modules_to_save=[str(name) for name in peft.get("modules_to_save") or []],
    )


def _without_matches(modules: str | list[str], exclude: str) -> str:
    """One regular expression for ``modules`` less what the expression ``exclude`` matches."""
    if not isinstance(modules, str):
        modules = rf"(?:.*\.)?(?:{'|'.join(re.escape(name) for name in modules)})"
    return f"(?!(?:{exclude})$)(?:{modules})"


def unusable_setting(error: LoratuneError, where: str) -> ModelError:
    """A setting that would be the recipe's fault is, read from a file, the file's."""
    cause = f"unusable adapter setting: {error.cause} ({error.where})"
    return ModelError(cause, where=where, fix=RESTORE_CONFIG)


def _layer_numbers(value: Any, where: str) -> list[int] | None:
    numbers = [value] if isinstance(value, int) else value
    if numbers is None:
        return None
    if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
        cause = "layers_to_transform is no list of numbers"
        raise ModelError(cause, where=where, fix=RESTORE_CONFIG)
    return numbers


def _plain_variant(peft: Mapping[str, Any], where: str) -> str:
    variant = str(peft.get("peft_type", "")).lower()
    if variant not in variant_names():
        raise ModelError(
            f"peft_type '{peft.get('peft_type')}' is not supported",
            where=where,
            fix=f"supported: {', '.join(name.upper() for name in ('lora', 'vera'))}",
        )
    return variant


def _refuse_unsupported(peft: Mapping[str, Any], where: str) -> None:
    errors: list[LoratuneError] = []
    for key in _UNSUPPORTED:
        if peft.get(key):
            errors.append(ModelError(f"'{key}' is not supported", where=where))
    if peft.get("bias", "none") != "none":
        errors.append(
            ModelError(f"trained biases (bias={peft['bias']}) are not supported", where=where)
        )
    init = peft.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _STARTS_FROM_THE_BASE:
        errors.append(
            ModelError(
                f"init_lora_weights={init}: such a start may replace the base weights",
                where=where,
                fix="convert the adapter to plain LoRA with PEFT first",
            )
        )
    auto_mapping = peft.get("auto_mapping") or {}
    if isinstance(auto_mapping, dict) and auto_mapping.get("parent_library"):
        library = str(auto_mapping["parent_library"])
        if library != "transformers" and not library.startswith("transformers."):
            errors.append(SecurityError(f"the adapter asks to import '{library}'", where=where))
    raise_together(errors)


def refuse_rank(config: AdapterConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """A rank that no tensor has, before anything of that size is allocated."""
    ranks = [config.rank, *config.rank_pattern.values()]
    largest = max(size for tensor in tensors.values() for size in tensor.shape or (1,))
    if max(ranks) > largest:
        raise ModelError(
            f"rank {max(ranks):,} is not the tensors': none has a side over {largest:,}",
            where=str(folder / CONFIG),
            fix=RESTORE_CONFIG,
        )
