"""The forms an adapter can be exported in, each proved against the original's ΔW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loratune.adapters.base import Adapter
from loratune.adapters.config import LayerKind
from loratune.config.schema import ExportFormat
from loratune.errors import MergeError, ModelError
from loratune.offline_adapter import OfflineAdapter
from loratune.peft_format import PREFIX, peft_config, projection_fingerprint, target_names

Form = tuple[dict[str, Any], dict[str, Tensor], dict[str, Any], dict[str, Any]]
"""adapter_config.json, tensors, loratune.json, proof."""

TOLERANCE = 1e-6


def _base_name(offline: OfflineAdapter) -> str:
    return str(offline.folder.peft.get("base_model_name_or_path") or "")


def as_peft(offline: OfflineAdapter) -> Form:
    """PEFT's own format, complete: what was left to a seed is written out."""
    from loratune.surgery import adapter_state

    tensors = {name: tensor.cpu() for name, tensor in adapter_state(offline.wrapped).items()}
    config = {**peft_config(offline.wrapped, _base_name(offline))}
    if "save_projection" in config:
        config["save_projection"] = True
    facts = {key: value for key, value in offline.folder.facts.items() if key != "files"}
    return config, tensors, facts, _prove(offline, {})


def as_plain_lora(offline: OfflineAdapter) -> Form:
    """Plain LoRA of one rank: scaling folded into B, short ranks padded with zeros.

    For servers that read only the global rank and alpha.  VeRA becomes exact LoRA factors
    A' = λ_d A, B' = s λ_b B.
    """
    if offline.wrapped.saved_modules:
        raise ModelError(
            "modules trained in full have no place in a plain LoRA file",
            where=", ".join(offline.wrapped.saved_modules),
            fix="export format=merged",
        )
    factors = {name: low_rank(layer) for name, layer in offline.wrapped.adapters.items()}
    rank = max(A.shape[0] for A, _ in factors.values())
    tensors: dict[str, Tensor] = {}
    rebuilt: dict[str, Tensor] = {}
    for name, (A, B) in factors.items():
        layer = offline.wrapped.adapters[name]
        A, B = _padded(A, B, rank)
        rebuilt[name] = _in_layout(layer, B @ A)
        keys = ("lora_A.weight", "lora_B.weight")
        if layer.shape.kind is LayerKind.embedding:
            keys = ("lora_embedding_A", "lora_embedding_B")
        tensors.update({f"{PREFIX}{name}.{keys[0]}": A, f"{PREFIX}{name}.{keys[1]}": B})
    config = {
        "base_model_name_or_path": _base_name(offline),
        "bias": "none",
        "inference_mode": True,
        "target_modules": target_names(offline.wrapped),
        "task_type": "CAUSAL_LM",
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    kept = ("base", "tokenizer", "prompt_format", "base_path")
    facts = {key: offline.folder.facts[key] for key in kept if key in offline.folder.facts}
    return config, tensors, {**facts, "variant": "lora", "adapter": {}}, _prove(offline, rebuilt)


def as_compact(offline: OfflineAdapter) -> Form:
    """Only what was trained; frozen matrices as seed and checksum, to be drawn again.

    VeRA's shared matrices are left out (PEFT draws them again too).  ``export format=peft``
    restores the whole file bit for bit, or refuses if the checksum differs.
    """
    wrapped = offline.wrapped
    shared = {key for layer in wrapped.adapters.values() for key in layer.shared_tensors()}
    if not shared:
        return _compact_lora(offline)
    tensors = {key: value for key, value in _all_tensors(offline).items() if key not in shared}
    config = {**peft_config(wrapped, _base_name(offline)), "save_projection": False}
    facts = {key: value for key, value in offline.folder.facts.items() if key != "files"}
    facts["projection"] = projection_fingerprint(wrapped)
    return config, tensors, facts, _prove(offline, {})


def _compact_lora(offline: OfflineAdapter) -> Form:
    from loratune.compact import drop_frozen

    tensors, recipe = drop_frozen(offline)
    facts = {key: value for key, value in offline.folder.facts.items() if key != "files"}
    config = peft_config(offline.wrapped, _base_name(offline))
    return config, tensors, {**facts, "regenerate": recipe}, _prove(offline, {})


def _all_tensors(offline: OfflineAdapter) -> dict[str, Tensor]:
    from loratune.surgery import adapter_state

    return {name: tensor.cpu() for name, tensor in adapter_state(offline.wrapped).items()}


def low_rank(layer: Adapter) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with ΔW = B A exactly, scaling and λ's folded in."""
    A, B = layer.low_rank_factors()
    return A.detach().float().cpu(), B.detach().float().cpu()


def _padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    short = rank - A.shape[0]
    padded_A = torch.cat([A, A.new_zeros(short, A.shape[1])])
    return padded_A.contiguous(), torch.cat([B, B.new_zeros(B.shape[0], short)], dim=1).contiguous()


def _in_layout(layer: Adapter, delta: Tensor) -> Tensor:
    return delta if layer.shape.kind is LayerKind.linear else delta.T


@torch.no_grad()
def _prove(offline: OfflineAdapter, rebuilt: Mapping[str, Tensor]) -> dict[str, Any]:
    """Largest relative difference of every module's ΔW between original and exported form."""
    worst, where = 0.0, ""
    for name, delta in rebuilt.items():
        original = offline.wrapped.adapters[name].delta_weight()
        scale = float(original.abs().max()) or 1.0
        error = float((original - delta).abs().max()) / scale
        if error >= worst:
            worst, where = error, name
    if worst > TOLERANCE:
        raise MergeError(f"the exported form differs by {worst:.2g}", where=where)
    return {"worst_relative_difference": worst, "module": where, "tolerance": TOLERANCE}


FORMS: dict[ExportFormat, Callable[[OfflineAdapter], Form]] = {
    ExportFormat.peft: as_peft,
    ExportFormat.portable: as_plain_lora,
    ExportFormat.lora: as_plain_lora,
    ExportFormat.compact: as_compact,
}
