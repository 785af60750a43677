"""Rotary positions as a GGUF file states them: a base, a linear factor, or factors a frequency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loratune.errors import ModelError


@dataclass(frozen=True)
class Rope:
    """How a model rotates queries and keys.

    Attributes:
        base: theta of the layers that attend to everything.
        linear: positions are divided by this.
        factors: (head_dim / 2,) by which each frequency is divided, or ``None``.
        window_base: theta of the layers with a sliding window, where it is another.
    """

    base: float
    linear: float = 1.0
    factors: Tensor | None = None
    window_base: float | None = None


def rope_of(config: Any, where: str) -> Rope:
    """A model's rotary positions.

    Raises:
        ModelError: for a kind of scaling that llama.cpp computes otherwise, or not at all.
    """
    settings = dict(config.rope_parameters)
    window = settings.pop("sliding_attention", None)
    settings = settings.pop("full_attention", settings)
    if window is not None and window.get("rope_type", "default") != "default":
        raise _refused(window["rope_type"], where)
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused("partial_rotary_factor", where)
    base = float(settings["rope_theta"])
    window_base = None if window is None else float(window["rope_theta"])
    kind = settings.get("rope_type", "default")
    if kind == "default":
        return Rope(base, window_base=window_base)
    if kind == "linear":
        return Rope(base, float(settings["factor"]), window_base=window_base)
    if kind == "llama3" and config.model_type == "llama":
        return Rope(base, factors=_llama3_factors(config, base))
    raise _refused(kind, where)


def _llama3_factors(config: Any, base: float) -> Tensor:
    """By transformers' own rule, so that both divide by the same numbers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    factors: Tensor = (1.0 / base**steps) / scaled
    return factors


def _refused(kind: str, where: str) -> ModelError:
    return ModelError(
        f"llama.cpp cannot compute rotary positions of type '{kind}' as this model does",
        where=where,
        fix="export format=merged",
    )
