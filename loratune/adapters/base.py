"""The adapter interface: a frozen layer plus a small trainable correction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from loratune.adapters.config import AdapterConfig, Kernel, LayerShape
from loratune.adapters.kernels.blocks import Blocks, blocks_of, weight_of
from loratune.adapters.optimizer import (
    OptimizerSettings,
    ParamGroup,
    adamw,
    decayed_and_plain_groups,
)
from loratune.errors import ModelError

ReadParameter = Callable[[Tensor], Tensor]
"""Gives the value of a parameter that lies on the meta device."""
CopyParameter = Callable[[Tensor], nn.Parameter]
"""Gives an fp32 copy of such a parameter that trains; it lies there too, until it is read."""
RowWriter = Callable[[slice, Tensor], None]
"""Writes the given rows of ΔW to a tensor of their shape, in the adapter's dtype."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer to adapt: the layer, its shape, and the rank and alpha that apply to it.

    ``original`` gives the weight (out, in) that a quantized layer was made of, ``read`` the value
    of a parameter that has no data yet, and ``copy`` a copy of it that gets its data with it.
    """

    base_layer: nn.Module
    shape: LayerShape
    rank: int
    alpha: float | None
    original: Callable[[], Tensor] | None = None
    read: ReadParameter | None = None
    copy: CopyParameter | None = None

    def value(self, parameter: Tensor) -> Tensor:
        """A parameter of the layer, read if it has no data and can be; else as it is."""
        return self.read(parameter) if self.read and parameter.is_meta else parameter

    def trained_copy(self, parameter: Tensor) -> nn.Parameter:
        """An fp32 copy that trains; of one without data, whatever lies in memory, or none yet."""
        if parameter.is_meta and self.copy:
            return self.copy(parameter)
        if parameter.is_meta:
            return nn.Parameter(torch.empty(parameter.shape))
        return nn.Parameter(parameter.detach().to(torch.float32, copy=True))

    def weight(self) -> Tensor:
        """The layer's weight with its numbers, if they are anywhere; widened if quantized."""
        return self.value(weight_of(self.base_layer))


class Adapter(nn.Module, ABC):
    """A frozen layer plus a correction: ``y + delta(x, y)`` with ``y = base_layer(x)``.

    The correction is linear in x, so that it is also a matrix: ``delta(x, y) = x ΔWᵀ``, plus
    ``delta_bias`` where it changes the base's bias too.  ΔW may depend on the weight W.  The base
    may lie on the meta device, without data: an adapter built there starts with any numbers of the
    right shape, since its own are about to be loaded.

    Attributes:
        base_layer: the layer that was there before; its parameters are frozen.
        rank: width r of the bottleneck.
        alpha: strength of the correction; ``None`` means the variant's neutral value.
        scaling: factor on the correction, computed once from rank and alpha.
        enabled: ``False`` makes the layer behave as its base.
        merged: ``True`` while the base weight holds the correction.
    """

    reads_base: ClassVar[bool] = True
    """Whether the correction depends on W: ``delta`` then reads y, and ``delta_rows`` W."""

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
        # In a mapping, since a module would register a bare parameter as its own.
        self._unmerged: dict[str, nn.Parameter] = {}

    @classmethod
    def build(cls, plans: Sequence[LayerPlan], config: AdapterConfig) -> list[Self]:
        """Adapters for ``plans``, in order; variants that share tensors override this."""
        return [cls(plan, config) for plan in plans]

    # -- the correction --------------------------------------------------------------------

    @abstractmethod
    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        """What is added to the base layer's output.

        Args:
            x: (..., in); token ids (...) for an embedding; (experts, ..., in) for stacked experts,
                each of which has inputs of its own.
            y: ``base_layer(x)``, (..., out), bias included: a variant that scales W takes
                ``self.bias`` away first.

        Returns:
            (..., out).
        """

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """``y + delta(x, y)``; override it where PEFT takes other steps to the same result."""
        return y + self.delta(x, y)

    @abstractmethod
    def delta_rows(self, weight: Tensor, rows: slice) -> Tensor:
        """Rows of ΔW in the layout in which the layer stores its weight.

        Args:
            weight: the whole W as stored, in its own dtype: (out, in), (in, out) for Conv1D,
                (vocabulary, width) for an embedding; for stacked experts a matrix as well, with
                the rows of one after those of another.  It may lie in a mapped file, and need not
                be ``self.weight``, which has no data where the base is on the meta device.
            rows: which, as indices into ``weight``; ``start`` and ``stop`` are set.

        Returns:
            (rows, columns of ``weight``) in the adapter's dtype.
        """

    @property
    def corrects_bias(self) -> bool:
        """Whether ``delta`` has a part that is not linear in x: what it makes of the bias."""
        return False

    def delta_bias(self, bias: Tensor) -> Tensor:
        """What is added to the base's bias, where ``corrects_bias`` says so; (out,)."""
        raise NotImplementedError

    def row_writer(self, weight: Tensor) -> RowWriter:
        """``delta_rows`` for many blocks of one weight; override it to share work among them."""

        def write(rows: slice, out: Tensor) -> None:
            out.copy_(self.delta_rows(weight, rows))

        return write

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """The whole ΔW, in the weight's own layout and the adapter's dtype."""
        weight = self.weight if weight is None else weight
        matrix = weight.reshape(-1, weight.shape[-1])
        return self.delta_rows(matrix, slice(0, matrix.shape[0])).view(weight.shape)

    @abstractmethod
    def adapter_tensors(self) -> dict[str, Tensor]:
        """This layer's own tensors under their names in PEFT's file (shared ones excluded)."""

    def trained_parameters(self) -> dict[str, Tensor]:
        """The layer's own parameters after training, by name, where they are trained themselves.

        Empty for a correction.  They are written into a merged model as they are: a sum of W and
        ΔW could miss them by a bit.
        """
        return {}

    def shared_tensors(self) -> dict[str, Tensor]:
        """Tensors shared by all layers, under their full names in PEFT's file."""
        return {}

    def fused_forward(self, x: Tensor) -> Tensor | None:
        """The whole layer by a fused kernel, or ``None`` where none applies."""
        return None

    def adapted_weight(self) -> Tensor:
        """W + ΔW of stacked experts, or W where the adapter is merged or off."""
        weight = self.weight
        if self.merged or not self.enabled:
            return weight
        return (weight.float() + self.delta_weight()).to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged and self.training:
            raise ModelError(
                "an adapter that is merged cannot train", where=self.shape.name, fix="unmerge first"
            )
        if self.shape.is_stacked:
            return self.adapted_weight()
        if self.merged or not self.enabled:
            return self._base(x)
        if self.config.kernel is not Kernel.reference:
            y = self.fused_forward(x)
            if y is not None:
                return y
        y = self._base(x)
        return self.output(x, y).to(y.dtype)

    def _base_is_plain(self) -> bool:
        """Whether the base layer's output is just x Wᵀ + bias, with nothing hooked in."""
        base = self.base_layer
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks
        is_known = type(base) is nn.Linear or type(base).__name__ == "Conv1D"
        return not hooked and (is_known or self.weight_blocks is not None)

    def _base(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y

    # -- merging ---------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The base weight, where models read ``layer.weight`` directly; widened if quantized."""
        return weight_of(self.base_layer)

    @property
    def stored_weight(self) -> Tensor:
        """The base weight as it is stored."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def weight_blocks(self) -> Blocks | None:
        """How the base weight is widened, where it is quantized."""
        return blocks_of(self.base_layer)

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
        return bool(self._unmerged)

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
    def merged_parameters(self) -> dict[str, Tensor]:
        """The base layer's parameters that merging changes, as they are then."""
        merged = {"weight": self.merged_weight()}
        if self.corrects_bias and self.bias is not None:
            total = self.bias.float() + self.delta_bias(self.bias).float()
            merged["bias"] = total.to(self.bias.dtype)
        return merged

    @torch.no_grad()
    def merge(self) -> None:
        """Put the correction into the base layer's weight; the old one is kept for ``unmerge``.

        The weight is exchanged, not written over: a layer that shares it (tied embeddings) stays
        as it is.  Merging twice changes nothing.

        Raises:
            ModelError: if the result is not finite; the base is left as it was.
        """
        if not self.merged:
            merged = self.merged_parameters()
            self._unmerged = {name: self.base_layer.get_parameter(name) for name in merged}
            self._exchange(merged)

    def _exchange(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.base_layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def unmerge(self) -> None:
        """Put the kept base weight back: the very tensor, shared again where it was shared."""
        for name, parameter in self._unmerged.items():
            self.base_layer.register_parameter(name, parameter)
        self._unmerged = {}

    def merged_layer(self) -> nn.Module:
        """The plain layer with the correction in its weight (a tied weight gets its own copy)."""
        self.unmerge()
        is_quantized = self.weight_blocks is not None
        self._exchange(self.merged_parameters())
        return plain_linear(self.base_layer) if is_quantized else self.base_layer

    # -- training --------------------------------------------------------------------------

    @classmethod
    def param_groups(
        cls, model: nn.Module, config: AdapterConfig, settings: OptimizerSettings
    ) -> list[ParamGroup]:
        """AdamW's parameter groups: everything that trains, in exactly one group, none empty."""
        return decayed_and_plain_groups(model, settings)

    @classmethod
    def make_optimizer(
        cls, model: nn.Module, config: AdapterConfig, settings: OptimizerSettings
    ) -> torch.optim.Optimizer:
        """AdamW over ``param_groups``; variants with their own rule override this."""
        return adamw(cls.param_groups(model, config, settings), settings)

    # -- state -----------------------------------------------------------------------------

    def scaled_tensors(self, scale: float) -> dict[str, Tensor]:
        """``adapter_tensors`` of an adapter of this strength: 0 is the base, 1 what was trained.

        Both ends to the bit.  In between it is W + scale · ΔW where the variant can hold that,
        and else the path that its own parameters take to it.

        Raises:
            ModelError: for a variant that has no such path.
        """
        raise ModelError(
            f"{self.config.variant} cannot be trained and then scaled: it has no scaled_tensors",
            where=self.shape.name,
            fix="train it for fewer steps, or at a lower rate, instead",
        )

    def peft_tensors(self) -> dict[str, Tensor]:
        """What the adapter file holds for this layer: the state, in the form that PEFT reads."""
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


def plain_linear(layer: nn.Module) -> nn.Linear:
    """A plain linear layer with the parameters of one whose class is made for quantized ones."""
    out_features, in_features = layer.get_parameter("weight").shape
    bias = getattr(layer, "bias", None)
    plain = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    plain.weight = layer.get_parameter("weight")
    plain.register_parameter("bias", bias)
    return plain.train(layer.training)


def scaled_as(embedding: nn.Module, rows: Tensor) -> Tensor:
    """Rows times the constant that an embedding multiplies its own by, as Gemma's and BART's do."""
    scale = getattr(embedding, "embed_scale", None)
    if scale is None:
        return rows
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


def data_device(weight: Tensor) -> torch.device:
    """Where an adapter's tensors live: with the base weight, or on the CPU if it has no data."""
    return torch.device("cpu") if weight.is_meta else weight.device


def pieces_of(rows: slice, height: int) -> list[tuple[int, slice]]:
    """Rows of a stack of matrices of ``height`` rows: number of the matrix, and its own rows."""
    pieces = []
    for number in range(rows.start // height, -(-rows.stop // height)):
        start = number * height
        part = slice(max(rows.start - start, 0), min(rows.stop - start, height))
        pieces.append((number, part))
    return pieces
