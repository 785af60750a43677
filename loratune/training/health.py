"""Health of a training: norms, update sizes, modules without gradient.

Everything measured here follows from weights and gradients alone, so that a resumed run measures
the same.  It is measured at a few steps only: at every step it would cost as much as the step of a
small adapter's optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median_high

import torch
from torch import Tensor

from loratune.runs import processes
from loratune.runs.sharded import is_shared_out, own_part
from loratune.surgery import WrappedModel

MEASUREMENTS = 30
"""About how often a training is measured; never more often than every tenth step."""
DEAD_BELOW = 1e-7
"""A module's gradient norm over the median module's, up to which it counts as none."""
NORM = "health/norm/"


class HealthMonitor:
    """Measures a training at its first and at every ``every``-th step.

    Args:
        wrapped: the model with its adapters.
        total: optimizer steps of the whole training.
    """

    def __init__(self, wrapped: WrappedModel, total: int) -> None:
        self.every = max(10, total // MEASUREMENTS)
        self.dead: list[str] = []
        self._modules = {
            name: [tensor for tensor in adapter.parameters() if tensor.requires_grad]
            for name, adapter in wrapped.adapters.items()
        }
        for name, saved in wrapped.saved_modules.items():
            self._modules[name] = [p for p in saved.parameters() if p.requires_grad]
        for name, rows in wrapped.token_rows.items():
            self._modules[name] = [rows.rows]
        self._kinds = _kinds(wrapped)
        trained = [tensor for tensors in self._modules.values() for tensor in tensors]
        self._trained = list(dict.fromkeys(trained))  # tied ones are in two modules
        self._frozen = [
            tensor
            for adapter in wrapped.adapters.values()
            for tensor in adapter.adapter_tensors().values()
            if not tensor.requires_grad
        ]
        self._before: list[Tensor] = []

    def due(self, step: int) -> bool:
        """Whether the step with this number (from 1) is measured."""
        return step == 1 or step % self.every == 0

    @torch.no_grad()
    def before_step(self) -> None:
        """Keep what trains, to see how far the step moves it."""
        self._before = [tensor.detach().clone() for tensor in self._trained]

    @torch.no_grad()
    def after_step(self) -> dict[str, float]:
        """Measure; gradients must still be there.

        Returns:
            ``health/update_norm`` ‖Δθ‖; ``health/update_ratio`` ‖Δθ‖/‖θ‖ with θ the layers' whole
            adapters before the step, what is frozen in them too; ``health/dead_modules``;
            ``health/norm/NAME`` the Frobenius norm of every kind of adapter tensor over all
            layers; and ``health/norm_ratio`` ‖B‖/‖A‖ where the adapter has such a pair.
        """
        size = _norm([*self._before, *self._frozen])
        moved = _norm(a - b for a, b in zip(self._trained, self._before, strict=True))
        self._before = []
        self.dead = self._without_gradient()
        norms = {kind: _norm(tensors) for kind, tensors in self._kinds.items()}
        measured = {
            "health/update_norm": moved,
            "health/update_ratio": moved / size if size else 0.0,
            "health/dead_modules": float(len(self.dead)),
            **{f"{NORM}{kind}": value for kind, value in norms.items()},
        }
        ratio = _pair_ratio(norms)
        return measured if ratio is None else {**measured, "health/norm_ratio": ratio}

    def _without_gradient(self) -> list[str]:
        names = [name for name, tensors in self._modules.items() if tensors]
        if not names:
            return []
        device = self._trained[0].device
        squares = [
            _squares(p.grad for p in self._modules[name] if p.grad is not None).to(device)
            for name in names
        ]
        values = torch.stack(squares).sqrt().tolist()
        usual = median_high(values)
        return [
            name for name, value in zip(names, values, strict=True)
            if value <= DEAD_BELOW * usual
        ]  # fmt: skip


def _kinds(wrapped: WrappedModel) -> dict[str, list[Tensor]]:
    """The adapters' own tensors by the last meaningful part of their name: lora_A, lora_B, ..."""
    kinds: dict[str, list[Tensor]] = {}
    for adapter in wrapped.adapters.values():
        for name, tensor in adapter.adapter_tensors().items():
            kinds.setdefault(name.removesuffix(".weight"), []).append(tensor)
    return kinds


def _pair_ratio(norms: dict[str, float]) -> float | None:
    for name, size in norms.items():
        partner = norms.get(f"{name[:-1]}B") if name.endswith("_A") else None
        if partner is not None and size:
            return partner / size
    return None


def _squares(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of squares over all processes; collective where they share the tensors out."""
    whole: list[Tensor] = []
    parts: list[Tensor] = []
    for tensor in tensors:
        square = own_part(tensor).float().square().sum()
        (parts if is_shared_out(tensor) else whole).append(square)
    total = torch.stack(whole).sum() if whole else torch.zeros(())
    if not parts:
        return total
    (others,) = processes.total([float(torch.stack(parts).sum())], parts[0].device)
    return total.to(parts[0].device) + others


def _norm(tensors: Iterable[Tensor] | Sequence[Tensor]) -> float:
    return float(_squares(tensors).sqrt())
