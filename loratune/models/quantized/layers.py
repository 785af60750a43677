"""Linear layers in 4 or 8 bits: bitsandbytes' own modules and numbers, multiplied block by block.

The modules hold what bitsandbytes would, so that other libraries take them for its own.  Their
products differ: bitsandbytes multiplies in bf16 outside training where a CPU can, and in 8 bits
it also quantizes activations or keeps them for the backward pass.  Here every pass multiplies with
the widened weight, in the number format of the input: training, evaluation and a merge into the
widened weights compute the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.adapters.kernels.blocks import frozen_linear
from loratune.models.quantized.format import BLOCK, SCALE_BLOCK, Quantization
from loratune.models.quantized.library import import_bitsandbytes

bnb = import_bitsandbytes()

CPU_BLOCK = 1 << 18
"""Numbers that are widened at a time on a CPU: 1 MB, which stays in the cache.

The C library takes what is no larger than something it has freed from one heap, where what stays
(finished tensors, activations) comes to lie between the holes: small pieces leave small holes.
"""
QUANTIZED_AT_ONCE = 1 << 16
"""Numbers that are quantized at a time on a CPU, with several temporary tensors of their size."""
FEWEST_ROWS = 64
"""Rows that are widened at a time at least: a product with fewer is slow."""
DEVICE_BLOCK = 1 << 24
"""The same on an accelerator, where a block should be worth a launch."""


class _Frozen(nn.Linear):
    """What both widths share.

    Attributes:
        wide_dtype: number format of the widened weight where nothing else decides it.
    """

    wide_dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.is_floating_point():  # an adapter is merged into it
            return F.linear(x, self.weight, self.bias)
        return frozen_linear(x, self.weight_blocks, self.bias, self.out_features)

    def weight_blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the weight in ``dtype``, some at a time."""
        raise NotImplementedError

    def _rows(self) -> Iterator[slice]:
        at_once = max(CPU_BLOCK, FEWEST_ROWS * self.in_features)
        return _row_slices(self.out_features, self.in_features, self.weight.device, at_once)


class Linear4Bit(_Frozen, bnb.nn.Linear4bit):  # type: ignore[misc, name-defined]
    """A weight in nf4 or fp4: two numbers a byte, one scale for each block of a row."""

    def weight_blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        state: Any = cast(Any, self.weight).quant_state
        scales, packed, width = _scales(state), self.weight.data.view(-1), self.in_features
        for rows in self._rows():
            numbers = slice(rows.start * width, rows.stop * width)
            block = torch.ops.bitsandbytes.dequantize_4bit(
                packed[numbers.start // 2 : numbers.stop // 2],
                scales[numbers.start // state.blocksize : numbers.stop // state.blocksize],
                state.blocksize,
                state.quant_type,
                (rows.stop - rows.start, width),
                dtype,
            )
            yield rows, block


class Linear8Bit(_Frozen, bnb.nn.Linear8bitLt):  # type: ignore[misc, name-defined]
    """A weight in int8 with one scale a row."""

    def weight_blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        scales = cast(Tensor, cast(Any, self.weight).SCB)
        for rows in self._rows():
            block = self.weight.data[rows].to(dtype)
            yield rows, block.mul_((scales[rows] * (1 / 127)).unsqueeze(1))


def _scales(state: Any) -> Tensor:
    """One fp32 scale a block."""
    if not state.nested:
        return cast(Tensor, state.absmax)
    wide = bnb.functional.dequantize_blockwise(state.absmax, state.state2)
    return cast(Tensor, wide.float().add_(state.offset))


def _row_slices(rows: int, columns: int, device: torch.device, on_cpu: int) -> Iterator[slice]:
    numbers = on_cpu if device.type == "cpu" else DEVICE_BLOCK
    step = max(1, numbers // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@torch.no_grad()
def quantized_linear(
    weight: Tensor, bias: Tensor | None, quantization: Quantization, dtype: torch.dtype
) -> nn.Linear:
    """A layer with a weight quantized, some rows at a time.

    Args:
        weight: (out, in); in 4 bits ``in`` is a multiple of ``BLOCK``.
        bias: (out) or ``None``.
        quantization: how.
        dtype: number format that the widened weight has by default.
    """
    out_features, in_features = weight.shape
    build = _in_4_bits if quantization.is_4bit else _in_8_bits
    rows = list(_row_slices(out_features, in_features, weight.device, QUANTIZED_AT_ONCE))
    return _layer(build(weight, rows, quantization, dtype), weight.shape, bias, dtype)


def _in_4_bits(
    weight: Tensor, slices: list[slice], quantization: Quantization, dtype: torch.dtype
) -> nn.Parameter:
    numbers, device = weight.numel(), weight.device
    packed = torch.empty(numbers // 2, 1, dtype=torch.uint8, device=device)
    scales = torch.empty(numbers // BLOCK, dtype=torch.float32, device=device)
    kind, width = str(quantization.kind), weight.shape[1]
    for rows in slices:
        part, own = torch.ops.bitsandbytes.quantize_4bit(
            weight[rows].float(), BLOCK, kind, torch.uint8
        )
        start = rows.start * width
        packed[start // 2 : start // 2 + len(part)] = part
        scales[start // BLOCK : start // BLOCK + len(own)] = own
    offset = second = None
    if quantization.double:
        offset = scales.mean()
        scales, second = bnb.functional.quantize_blockwise(scales - offset, blocksize=SCALE_BLOCK)
    state = bnb.functional.QuantState(
        absmax=scales,
        shape=weight.shape,
        code=bnb.functional.get_4bit_type(kind, device=device),
        blocksize=BLOCK,
        quant_type=kind,
        dtype=dtype,
        offset=offset,
        state2=second,
    )
    return _parameter_4bit(packed, state)


def _parameter_4bit(packed: Tensor, state: Any) -> nn.Parameter:
    parameter: nn.Parameter = bnb.nn.Params4bit(
        packed,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        bnb_quantized=True,
    )
    return parameter


def _in_8_bits(
    weight: Tensor, slices: list[slice], quantization: Quantization, dtype: torch.dtype
) -> nn.Parameter:
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows in slices:  # the rows are independent; bitsandbytes reads fp16
        part = weight[rows].to(torch.float16)
        numbers[rows], scales[rows], _ = bnb.functional.int8_vectorwise_quant(part)
    return _parameter_8bit(numbers, scales)


def _parameter_8bit(numbers: Tensor, scales: Tensor) -> nn.Parameter:
    parameter: nn.Parameter = bnb.nn.Int8Params(
        numbers, requires_grad=False, has_fp16_weights=False, CB=numbers, SCB=scales
    )
    return parameter


def _layer(
    weight: nn.Parameter, shape: torch.Size, bias: Tensor | None, dtype: torch.dtype
) -> nn.Linear:
    out_features, in_features = shape
    is_4bit = weight.dtype is torch.uint8
    kind = Linear4Bit if is_4bit else Linear8Bit
    options: dict[str, Any] = {} if is_4bit else {"has_fp16_weights": False}
    layer: Any = kind(in_features, out_features, bias is not None, device="meta", **options)
    layer.weight, layer.wide_dtype = weight, dtype
    if is_4bit:
        state = cast(Any, weight).quant_state
        layer.quant_state, layer.compute_dtype, layer.compute_type_is_set = state, dtype, True
        cast(Any, weight).module = layer
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return cast(nn.Linear, layer)


def stored_linear(
    tensors: Mapping[str, Tensor],
    shape: torch.Size,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> nn.Linear:
    """A layer from the tensors that bitsandbytes writes of it.

    Args:
        tensors: ``weight`` and what else is stored of it, without the layer's name.
        shape: (out, in).
        bias: (out) or ``None``.
        dtype: number format that the widened weight has by default.

    Raises:
        KeyError, ValueError, AssertionError: if they do not belong together.
    """
    weight = tensors["weight"].clone()
    if weight.dtype is torch.int8:
        return _layer(_parameter_8bit(weight, tensors["SCB"].clone()), shape, bias, dtype)
    own = {n.removeprefix("weight."): t.clone() for n, t in tensors.items() if n != "weight"}
    state = bnb.functional.QuantState.from_dict(own, device=weight.device)
    if state.shape != shape or shape[1] % state.blocksize:
        raise ValueError(f"{list(state.shape)} in blocks of {state.blocksize}")
    return _layer(_parameter_4bit(weight, state), shape, bias, dtype)


def stored_tensors(layer: nn.Linear) -> dict[str, Tensor]:
    """The tensors that bitsandbytes writes of a layer: ``weight`` and what belongs to it."""
    tensors = layer.state_dict()
    tensors.pop("bias", None)
    return dict(tensors)
