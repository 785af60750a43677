"""The closed-form gradient of LoRA-FA's B, and the AdamW rule it was published with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loratune.adapters.config import Kernel
from loratune.adapters.optimizer import OptimizerSettings, ParamGroup

RIDGE = 1e-8
NEAR_SINGULAR = 1e5


def projected_gradient(grad: Tensor, lora_A: Tensor, scaling: float) -> Tensor:
    """(1/s²)·g·(AAᵀ + ridge)⁻¹ by pseudo-inverse, in A's dtype: the rule that PEFT follows.

    It is the X that minimises ‖s·X·A − G‖, G the gradient of the full weight, since g = s·G·Aᵀ.

    Args:
        grad: gradient of B, (out, r).
        lora_A: (r, in).
        scaling: s of this layer.
    """
    gram = lora_A @ lora_A.T
    inverse = torch.linalg.pinv(gram + RIDGE * torch.eye(len(gram)).to(gram.device))
    projected: Tensor = (1 / scaling**2) * (grad @ inverse)
    return projected


@dataclass(frozen=True)
class FrozenFactor:
    """What B's closed-form gradient needs to know of its layer.

    Attributes:
        lora_A: the frozen A, (r, in).
        scaling: s of the layer.
        name: the layer's, for the warning.
    """

    lora_A: Tensor
    scaling: float
    name: str = ""


class GramFactor:
    """The Cholesky factor of AAᵀ + ridge in double precision, computed once: A never changes.

    Solving with it costs r²·out, not an eigen-decomposition per step.  Its result is the exact
    one rounded to fp32, up to double precision's own error times the condition of AAᵀ; how the
    processor sums its dot products does not matter.
    """

    def __init__(self, lora_A: Tensor, name: str = "") -> None:
        gram = lora_A.double() @ lora_A.double().T
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        condition = float(torch.linalg.cond(gram))
        if condition > NEAR_SINGULAR:
            warnings.warn(
                f"AAᵀ is near singular (condition {condition:.1e}){name and ' in ' + name}: the "
                "projected gradient amplifies noise; lower adapter.rank or use init=orthonormal",
                stacklevel=2,
            )
        factor, info = torch.linalg.cholesky_ex(gram + RIDGE * eye)
        if int(info) != 0:
            ridge = RIDGE * max(1.0, float(gram.diagonal().mean()))
            factor = torch.linalg.cholesky(gram + 1e3 * ridge * eye)
        self.factor = factor

    def solve(self, grad: Tensor, scaling: float) -> Tensor:
        """(1/s²)·g·(AAᵀ + ridge)⁻¹ for the gradient g (out, r)."""
        solution: Tensor = torch.cholesky_solve(grad.double().T, self.factor).T / scaling**2
        return solution.float()


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW over B's closed-form gradient, in the order of the paper's reference code.

    It differs from ``torch.optim.AdamW``: eps is added to the uncorrected √v, and the weight
    decays after the step.  State is keyed by parameter, so that saving, loading and moving it
    are torch's own.

    Args:
        groups: parameter groups.
        factors: B to what is frozen beside it; other parameters take plain gradients.
        settings: learning rate, betas; eps defaults to the paper's 1e-6.
        kernel: ``reference`` follows PEFT to the bit, else the Cholesky solve.
    """

    def __init__(
        self,
        groups: list[ParamGroup],
        factors: Mapping[nn.Parameter, FrozenFactor],
        settings: OptimizerSettings,
        kernel: Kernel,
    ) -> None:
        eps = 1e-6 if settings.eps is None else settings.eps
        defaults: dict[str, Any] = {
            "lr": settings.lr,
            "betas": settings.betas,
            "eps": eps,
            "weight_decay": settings.weight_decay,
        }
        super().__init__(groups, defaults)
        self._factors = dict(factors)
        self._grams: dict[nn.Parameter, GramFactor] = {}
        if kernel is not Kernel.reference:
            self._grams = {B: GramFactor(f.lora_A, f.name) for B, f in factors.items()}

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        if parameter not in self._factors:
            return parameter.grad
        layer = self._factors[parameter]
        if parameter in self._grams:
            return self._grams[parameter].solve(parameter.grad, layer.scaling).to(parameter.dtype)
        gradient = projected_gradient(parameter.grad, layer.lora_A, layer.scaling)
        return gradient.to(parameter.dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; parameters without a gradient (unused modules) are left alone."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self._gradient(parameter), group)
        return loss

    def _update(self, parameter: nn.Parameter, grad: Tensor, group: ParamGroup) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        step = int(state["step"])
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        denominator = state["exp_avg_sq"].sqrt().add_(group["eps"])
        correction = math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)
        parameter.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] * correction)
        if group["weight_decay"] > 0.0:
            parameter.add_(parameter, alpha=-group["lr"] * group["weight_decay"])
