"""Our settings from PEFT's ``adapter_config.json``: a file by a stranger, read without trust."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from loratune.adapters.config import AdapterConfig
from loratune.adapters.registry import config_class, variant_names
from loratune.config.schema import TargetsConfig
from loratune.errors import LoratuneError, ModelError, SecurityError, raise_together

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT puts in front of a module's name in its files."""
RESTORE_CONFIG = "restore the adapter_config.json that belongs to the tensors"
# Settings that change the maths; each is supported only by a variant that claims it.
_COMMON = (
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "fan_in_fan_out", "bias",
    "modules_to_save", "layers_to_transform", "layers_pattern", "trainable_token_indices",
    "ensure_weight_tying", "init_weights",
    # Of LoRA's starts and libraries: nothing of them is left once the factors are saved, and a
    # start that replaces the base is refused by ``init_lora_weights``.
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config",
)  # fmt: skip
_SWITCHES = (
    "use_dora", "lora_bias", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "megatron_config", "velora_config", "use_bdlora",
    "monteclora_config", "kasa_config", "arrow_config",
)  # fmt: skip

# Starts after which the base is still the base, so that the saved factors are all there is.
_STARTS_FROM_THE_BASE = ("gaussian", "orthogonal", "eva", "mica", "true")


def configs_from_peft(
    peft: Mapping[str, Any], facts: Mapping[str, Any], folder: Path
) -> tuple[AdapterConfig, TargetsConfig]:
    """Our settings from ``adapter_config.json``, completed by ``loratune.json`` where it is there.

    Raises:
        ModelError: for a kind of adapter, or a setting, that is not supported.
        SecurityError: for paths and libraries that a configuration has no business naming.
    """
    where = str(folder / CONFIG)
    _check_supported(peft, where)
    variant = _variant_of(peft, facts, where)
    try:
        config = variant.from_peft(peft, dict(facts.get("adapter", {})))
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
        cause = "layers_to_transform is not a list of numbers"
        raise ModelError(cause, where=where, fix=RESTORE_CONFIG)
    return numbers


def structure_of(variant: type[AdapterConfig]) -> str:
    """What a variant's file holds, in words: variants of one structure read each other's files."""
    return " with ".join([variant.peft_type, *sorted(variant.peft_switches)])


def _variant_of(
    peft: Mapping[str, Any], facts: Mapping[str, Any], where: str
) -> type[AdapterConfig]:
    """The variant that our own record names, or else the one whose structure the file has."""
    if facts.get("variant"):
        candidates = [config_class(str(facts["variant"]))]
    else:
        variants = [config_class(name) for name in variant_names()]
        candidates = [variant for variant in variants if "peft_type" in vars(variant)]
    for variant in candidates:
        if variant.peft_type == peft.get("peft_type") and variant.peft_switches == _switched(peft):
            return variant
    raise ModelError(
        f"peft_type '{peft.get('peft_type')}' is not supported",
        where=where,
        fix=f"supported: {', '.join(sorted(structure_of(variant) for variant in candidates))}",
    )


def _switched(peft: Mapping[str, Any]) -> frozenset[str]:
    """The settings with a variant of their own that a file switches on."""
    claims = (config_class(name).peft_switches for name in variant_names())
    return frozenset(key for key in (*_SWITCHES, *chain(*claims)) if peft.get(key))


def _check_supported(peft: Mapping[str, Any], where: str) -> None:
    errors: list[LoratuneError] = []
    variants = [config_class(name) for name in variant_names()]
    claimed = {
        key for v in variants if v.peft_type == peft.get("peft_type") for key in v.peft_switches
    }
    for key in sorted(_switched(peft) - claimed):
        errors.append(ModelError(f"'{key}' is not supported", where=where))
    unknown = _unknown_settings(peft)
    if unknown:
        named = ", ".join(f"'{key}'" for key in unknown)
        written = f" (PEFT {peft['peft_version']} wrote it)" if peft.get("peft_version") else ""
        errors.append(
            ModelError(
                f"{named}: not settings that this version of loratune knows{written}",
                where=where,
                fix="they may change what the adapter computes; remove them if they do not",
            )
        )
    if peft.get("bias", "none") != "none":
        errors.append(
            ModelError(f"trained biases (bias={peft['bias']}) are not supported", where=where)
        )
    start = peft.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _STARTS_FROM_THE_BASE:
        errors.append(
            ModelError(
                f"init_lora_weights={start}: such a start may replace the base weights",
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


def edited_settings(peft: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Which settings of an edited file are not those of our own record, or an empty string."""
    try:
        variant = config_class(str(facts["variant"]))
        recorded = variant(**facts["adapter"]).to_peft()
    except (LoratuneError, KeyError, TypeError, ValueError):
        return ""
    return ", ".join(
        f"{key} is {peft.get(key)}, recorded {value}"
        for key, value in recorded.items()
        if key in peft and key not in ("fan_in_fan_out", "init_lora_weights") and peft[key] != value
    )


def _unknown_settings(peft: Mapping[str, Any]) -> list[str]:
    """Keys with a value that neither PEFT's settings nor any variant of this kind account for."""
    kind = peft.get("peft_type")
    variants = [v for v in map(config_class, variant_names()) if v.peft_type == kind]
    if not variants:
        return []  # the kind itself is not supported, which is said instead
    own = chain(*(v().to_peft() for v in variants), *(v.peft_switches for v in variants))
    accounted = {*_COMMON, *_SWITCHES, *own}
    return sorted(k for k, value in peft.items() if k not in accounted and not _is_unset(value))


def _is_unset(value: Any) -> bool:
    """Whether a value says "not used": nothing, false or empty; 0 is a number like others."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def check_rank(config: AdapterConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """A rank that no tensor has, before anything of that size is allocated."""
    ranks = [config.rank, *config.rank_pattern.values()]
    largest = max(size for tensor in tensors.values() for size in tensor.shape or (1,))
    if max(ranks) > largest:
        raise ModelError(
            f"rank {max(ranks):,} is not the tensors': none has a side over {largest:,}",
            where=str(folder / CONFIG),
            fix=RESTORE_CONFIG,
        )
