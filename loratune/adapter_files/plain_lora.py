"""One adapter, or a weighted sum of several, as plain LoRA of one rank and scaling 1.

Factors are put side by side: [B₁ B₂] [A₁; A₂] = B₁A₁ + B₂A₂, so that the sum is exact but for one
rounding of every number of B, into which scalings and weights are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loratune.adapter_files.offline import MetaAdapter
from loratune.adapter_files.peft_config import PREFIX
from loratune.adapter_files.peft_format import stores_input_first
from loratune.adapter_files.peft_targets import peft_targets
from loratune.adapters.base import Adapter
from loratune.adapters.config import LayerKind
from loratune.adapters.low_rank import LowRank
from loratune.errors import ModelError

Factors = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r)."""


def plain_lora(
    offlines: Sequence[MetaAdapter], weights: Sequence[float]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``adapter_config.json`` and tensors of Σ weight · ΔW, short ranks padded with zeros.

    For servers that read only the global rank and alpha.

    Raises:
        ModelError: if a correction is not a product of two factors, or a module was trained in
            full.
    """
    layers = summed_layers(offlines)
    factors = {name: _side_by_side(terms, weights) for name, terms in layers.items()}
    rank = max(A.shape[0] for A, _ in factors.values())
    wrapped = replace(
        offlines[0].wrapped,
        adapters={name: next(layer for layer in terms if layer) for name, terms in layers.items()},
    )
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in factors.items():
        A, B = _padded(A, B, rank)
        keys = ("lora_A.weight", "lora_B.weight")
        if wrapped.adapters[name].shape.kind is LayerKind.embedding:
            keys = ("lora_embedding_A", "lora_embedding_B")
        tensors.update({f"{PREFIX}{name}.{keys[0]}": A, f"{PREFIX}{name}.{keys[1]}": B})
    config = {
        "base_model_name_or_path": str(
            offlines[0].folder.peft.get("base_model_name_or_path") or ""
        ),
        "bias": "none",
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "fan_in_fan_out": stores_input_first(wrapped),
        "init_lora_weights": True,
    }
    return config | peft_targets(wrapped, config).settings, tensors


def summed_layers(
    offlines: Sequence[MetaAdapter],
) -> dict[str, list[LowRank | None]]:
    """Of every layer that any adapter corrects, each adapter's correction, or ``None``.

    Raises:
        ModelError: naming what has no place in a plain LoRA file.
    """
    for offline in offlines:
        if saved := list(offline.wrapped.saved_modules):
            more = f" and {len(saved) - 1} more" if len(saved) > 1 else ""
            raise ModelError(
                f"modules trained in full ('{saved[0]}'{more}) have no place in a plain LoRA file",
                where=str(offline.folder.path),
                fix="export format=merged",
            )
    names = dict.fromkeys(name for offline in offlines for name in offline.wrapped.adapters)
    return {
        name: [_low_rank(offline.wrapped.adapters.get(name)) for offline in offlines]
        for name in names
    }


def _low_rank(layer: Adapter | None) -> LowRank | None:
    if layer is None or isinstance(layer, LowRank):
        return layer
    raise ModelError(
        f"{layer.config.variant} is not a product of two factors: plain LoRA cannot hold it",
        where=layer.shape.name,
        fix="export format=peft or format=merged",
    )


def factors_of(layer: LowRank) -> Factors:
    """The factors with B A = ΔW, in fp32 on the CPU."""
    A, B = layer.low_rank_factors()
    return A.detach().float().cpu(), B.detach().float().cpu()


def _side_by_side(terms: Sequence[LowRank | None], weights: Sequence[float]) -> Factors:
    pairs = [
        (factors_of(layer), weight)
        for layer, weight in zip(terms, weights, strict=True)
        if layer is not None
    ]
    A = torch.cat([A for (A, _), _ in pairs])
    return A, torch.cat([B * weight for (_, B), weight in pairs], dim=1)


def _padded(A: Tensor, B: Tensor, rank: int) -> Factors:
    short = rank - A.shape[0]
    padded_A = torch.cat([A, A.new_zeros(short, A.shape[1])])
    return padded_A.contiguous(), torch.cat([B, B.new_zeros(B.shape[0], short)], dim=1).contiguous()


def plain_facts(offlines: Sequence[MetaAdapter]) -> dict[str, Any]:
    """``loratune.json``: what all the adapters' records say alike of base, tokenizer, prompts."""
    first, *others = [offline.folder.facts for offline in offlines]
    alike = {
        key: first[key]
        for key in ("base", "tokenizer", "prompt_format", "base_path")
        if key in first and all(facts.get(key) == first[key] for facts in others)
    }
    return {**alike, "variant": "lora", "adapter": {}}
