"""The adapter interface: a frozen layer plus a small trainable correction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from loratune.adapters.config import AdapterConfig, Kernel, LayerKind, LayerShape
from loratune.errors import ModelError

ParamGroup = dict[str, Any]


@dataclass(frozen=True)
class LayerPlan:
    """One layer to adapt: the layer, its shape, and the rank and alpha that apply to it."""

    base_layer: nn.Module
    shape: LayerShape
    rank: int
    alpha: float | None


@dataclass(frozen=True)
class OptimizerSettings:
    """What the trainer asks of an optimizer; ``lr`` is the variant's base learning rate."""

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float | None = None
    fused: bool = False


class Adapter(nn.Module, ABC):
    """A frozen layer plus a correction: ``y = base_layer(x) + delta(x)``.

    Attributes:
        base_layer: the layer that was there before; its parameters are frozen.
        rank: width r of the bottleneck.
        alpha: strength of the correction; ``None`` means the variant's neutral value.
        scaling: factor on the correction, computed once from rank and alpha.
        enabled: ``False`` makes the layer behave as its base.
        merged: ``True`` while the base weight holds the correction.
    """

    peft_type: ClassVar[str]
    """``peft_type`` in PEFT's ``adapter_config.json``."""

    def __init__(self, plan: LayerPlan, config: AdapterConfig) -> None:
        super().__init__()
        self.base_layer = plan.base_layer.requires_grad_(False)
        self.shape = plan.shape
        self.config = config
        self.rank = plan.rank
        self.alpha = plan.alpha
        self.scaling = config.scaling(plan.rank, plan.alpha)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.enabled = True
        # In a tuple, since a module would register a bare parameter as its own.
        self._kept: tuple[nn.Parameter, ...] = ()

    @classmethod
    def build(cls, plans: Sequence[LayerPlan], config: AdapterConfig) -> list[Self]:
        """Adapters for ``plans``, in order; variants that share tensors override this."""
        return [cls(plan, config) for plan in plans]

    # -- the correction --------------------------------------------------------------------

    @abstractmethod
    def delta(self, x: Tensor) -> Tensor:
        """The correction for input ``x``: (..., in) → (..., out), token ids for an embedding."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A (r, in), B (out, r) and the scale s of the correction s · (B A).

        The scale is apart because it is multiplied last, as PEFT does: that decides the last bit.
        """

    def delta_weight(self) -> Tensor:
        """ΔW in the base weight's own layout, in the adapter's dtype."""
        A, B, scale = self.factors()
        delta = torch.mm(B, A).mul_(scale)
        return delta if self.shape.kind is LayerKind.linear else delta.T

    def low_rank_factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) whose product B A is the whole correction, scaling included."""
        A, B, scale = self.factors()
        return A, B * scale

    @abstractmethod
    def adapter_tensors(self) -> dict[str, Tensor]:
        """This layer's own tensors under their names in PEFT's file (shared ones excluded)."""

    def shared_tensors(self) -> dict[str, Tensor]:
        """Tensors shared by all layers, under their full names in PEFT's file."""
        return {}

    def fused_forward(self, x: Tensor) -> Tensor | None:
        """The whole layer by a fused kernel, or ``None`` where none applies."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged and self.training:
            raise ModelError(
                "an adapter that is merged cannot train", where=self.shape.name, fix="unmerge first"
            )
        if self.merged or not self.enabled:
            return self._base(x)
        if self.config.kernel is not Kernel.reference:
            y = self.fused_forward(x)
            if y is not None:
                return y
        y = self._base(x)
        return (y + self.delta(x)).to(y.dtype)

    def _base_is_plain(self) -> bool:
        """Whether the base layer's output is just x Wᵀ + bias, with nothing hooked in."""
        base = self.base_layer
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks
        return not hooked and (type(base) is nn.Linear or type(base).__name__ == "Conv1D")

    def _base(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y

    # -- merging ---------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The base weight, where models read ``layer.weight`` directly."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base bias, where models read ``layer.bias`` directly."""
        bias = getattr(self.base_layer, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def in_features(self) -> int:
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        return self.shape.out_features

    @property
    def merged(self) -> bool:
        return bool(self._kept)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + ΔW, summed in fp32 and rounded once to the base dtype.

        Raises:
            ModelError: if the sum is not finite.
        """
        total = (self.weight.float() + self.delta_weight().float()).to(self.weight.dtype)
        if not torch.isfinite(total).all():
            raise ModelError(
                "merging gives NaN or infinite weights",
                where=self.shape.name,
                fix="the adapter is broken or its scaling overflows this dtype",
            )
        return total

    @torch.no_grad()
    def merge(self) -> None:
        """Put the correction into the base layer's weight; the old one is kept for ``unmerge``.

        The weight is exchanged, not written over: a layer that shares it (tied embeddings) stays
        as it is.  Merging twice changes nothing.

        Raises:
            ModelError: if the result is not finite; the base is left as it was.
        """
        if not self.merged:
            merged = nn.Parameter(self.merged_weight(), requires_grad=False)
            kept = self.weight
            assert isinstance(kept, nn.Parameter)
            self._kept = (kept,)
            self.base_layer.weight = merged

    def unmerge(self) -> None:
        """Put the kept base weight back: the very tensor, shared again where it was shared."""
        if self._kept:
            (self.base_layer.weight,) = self._kept
            self._kept = ()

    def merged_layer(self) -> nn.Module:
        """The plain layer with the correction in its weight (a tied weight gets its own copy)."""
        self.unmerge()
        weight = nn.Parameter(self.merged_weight(), requires_grad=False)
        self.base_layer.weight = weight
        return self.base_layer

    # -- training --------------------------------------------------------------------------

    @classmethod
    def param_groups(
        cls,
        model: nn.Module,
        config: AdapterConfig,
        settings: OptimizerSettings,
    ) -> list[ParamGroup]:
        """AdamW's parameter groups: everything that trains, in exactly one group, none empty."""
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in trainable_parameters(model):
            (plain if is_bias_or_norm(model, name) else decayed).append(parameter)
        groups = [
            {"name": "adapter", "params": decayed, "weight_decay": settings.weight_decay},
            {"name": "no_decay", "params": plain, "weight_decay": 0.0},
        ]
        return [{**group, "lr": settings.lr} for group in groups if group["params"]]

    @classmethod
    def make_optimizer(
        cls, model: nn.Module, config: AdapterConfig, settings: OptimizerSettings
    ) -> torch.optim.Optimizer:
        """AdamW over ``param_groups``; variants with their own rule override this."""
        groups = cls.param_groups(model, config, settings)
        return torch.optim.AdamW(
            groups,
            lr=settings.lr,
            betas=settings.betas,
            eps=1e-8 if settings.eps is None else settings.eps,
            fused=settings.fused or None,
        )

    # -- state -----------------------------------------------------------------------------

    def peft_tensors(self) -> dict[str, Tensor]:
        """What the adapter file holds for this layer; differs from the state only in scale."""
        return self.adapter_tensors()

    @torch.no_grad()
    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``peft_tensors``."""
        self.load_adapter_tensors(tensors)

    @torch.no_grad()
    def load_adapter_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors, named as in PEFT's file, into this layer; names and shapes must match."""
        own = self.adapter_tensors()
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def trainable_parameters(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Name and parameter of everything that trains, in the model's order, each once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def is_bias_or_norm(model: nn.Module, name: str) -> bool:
    """Whether a parameter is a bias or belongs to a normalisation layer: never decayed."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    return attribute == "bias" or "norm" in type(owner).__name__.lower()


def data_device(weight: Tensor) -> torch.device:
    """Where an adapter's tensors live: with the base weight, or on the CPU if it has no data."""
    return torch.device("cpu") if weight.is_meta else weight.device
