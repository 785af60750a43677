"""A trained adapter at other strengths: how quality and retention depend on its scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from loratune.errors import ConfigError
from loratune.surgery import WrappedModel

Measured = TypeVar("Measured")
LEAST, MOST = 0.0, 2.0
"""Scales that may be tried: beyond twice the adapter nothing was ever trained."""


class Strength:
    """Sets a wrapped model's adapters, and what else was trained, to a share of what they became.

    Always from the trained values, so that the order of scales does not matter.
    """

    def __init__(self, wrapped: WrappedModel) -> None:
        self._wrapped = wrapped
        self._adapters = {
            name: _copies(adapter.adapter_tensors()) for name, adapter in wrapped.adapters.items()
        }
        self._saved = {
            name: _copies(saved.trained_module.state_dict())
            for name, saved in wrapped.saved_modules.items()
        }
        self._rows = {name: rows.rows.detach().clone() for name, rows in wrapped.token_rows.items()}

    @torch.no_grad()
    def set(self, scale: float) -> None:
        """Put the adapters at ``scale``.

        Raises:
            ModelError: for a variant that cannot be scaled once it is trained.
        """
        adapters = self._wrapped.adapters
        for name, adapter in adapters.items():
            adapter.load_adapter_tensors(self._adapters[name])
        # All are computed before any is loaded: layers may train one tensor together.
        scaled = {name: _copies(one.scaled_tensors(scale)) for name, one in adapters.items()}
        for name, adapter in adapters.items():
            adapter.load_adapter_tensors(scaled[name])
        for name, saved in self._wrapped.saved_modules.items():
            base = saved.original_module.state_dict()
            for key, tensor in saved.trained_module.state_dict().items():
                tensor.copy_(_between(base[key], self._saved[name][key], scale))
        for name, rows in self._wrapped.token_rows.items():
            base_rows = rows.base_rows()
            rows.rows.copy_(_between(base_rows, self._rows[name], scale))


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def _between(base: Tensor, trained: Tensor, scale: float) -> Tensor:
    """Either end to the bit; counters and the like stay as trained."""
    if not trained.is_floating_point():
        return trained
    return torch.lerp(base.to(trained), trained, scale)


def sweep(
    wrapped: WrappedModel, scales: Sequence[float], measure: Callable[[float], Measured]
) -> list[Measured]:
    """Measure the model at every scale; the adapter is as trained afterwards.

    Args:
        wrapped: the model, in eval mode.
        scales: in any order.
        measure: is given each scale once the model is at it.

    Raises:
        ConfigError: a scale that is out of range.
        ModelError: for a variant that cannot be scaled once it is trained.
    """
    for scale in scales:
        if not LEAST <= scale <= MOST:
            cause = f"{scale:g} is out of range"
            raise ConfigError(cause, where="scales", fix=f"use {LEAST:g} to {MOST:g}")
    strength = Strength(wrapped)
    try:
        points = []
        for scale in sorted(set(scales)):
            strength.set(scale)
            points.append(measure(scale))
        return points
    finally:
        strength.set(1.0)
