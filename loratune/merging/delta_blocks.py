"""ΔW of a module some rows at a time, checked against what the layer computes with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loratune.adapters.base import Adapter, pieces_of
from loratune.adapters.config import LayerKind

PROBES = 8
"""Random inputs, or token ids, on which a layer is asked for its own output."""


class DeltaBlocks:
    """One adapter's ΔW, block by block: the whole of it is never in memory.

    The layer's own ``delta(x, y)`` on random inputs is compared with x ΔWᵀ: a sign, a transpose or
    a scaling lost on the way to the merged weight shows there.

    Attributes:
        shape: of the weight, in its own layout.
        dtype: the adapter's.
        device: where the adapter is.
    """

    def __init__(self, adapter: Adapter, weight: Tensor) -> None:
        self._adapter, self._weight = adapter, weight
        own = next(iter(adapter.adapter_tensors().values()))
        self.shape, self.dtype, self.device = adapter.weight.shape, own.dtype, own.device
        self._write = adapter.row_writer(weight)
        self._inputs = _probe_inputs(adapter).to(self.device)
        outputs = (*self._inputs.shape[:-1], adapter.out_features)
        if adapter.shape.kind is LayerKind.embedding:
            outputs = PROBES, adapter.out_features
        self._base = self._inputs.new_zeros(outputs, dtype=torch.float32)
        self._corrections = torch.zeros_like(self._base)

    def block(self, rows: slice, base: Tensor, out: Tensor) -> None:
        """Write ``rows`` of ΔW to ``out``, in the adapter's dtype; ``base`` is W's rows in fp32."""
        self._write(rows, out)
        self._multiply(rows, out, self._corrections)
        if self._adapter.reads_base:
            self._multiply(rows, base.to(self.device), self._base)

    def _multiply(self, rows: slice, block: Tensor, outputs: Tensor) -> None:
        """Put what ``rows`` of a matrix do to the probe inputs into ``outputs``."""
        x, block = self._inputs, block.float()
        if self._adapter.shape.is_stacked:
            self._multiply_experts(rows, block, outputs)
        elif self._adapter.shape.kind is LayerKind.linear:
            outputs[:, rows] = nn.functional.linear(x, block)
        elif self._adapter.shape.kind is LayerKind.conv1d:
            outputs += x[:, rows] @ block
        else:
            here = (x >= rows.start) & (x < rows.stop)
            outputs[here] = block[x[here] - rows.start]

    def _multiply_experts(self, rows: slice, block: Tensor, outputs: Tensor) -> None:
        done = 0
        for expert, part in pieces_of(rows, self.shape[1]):
            own = block[done : done + part.stop - part.start]
            done += part.stop - part.start
            x = self._inputs[expert]
            if self._adapter.shape.kind is LayerKind.experts:
                outputs[expert, :, part] = nn.functional.linear(x, own)
            else:
                outputs[expert] += x[:, part] @ own

    def probe_error(self) -> float:
        """After the last block: largest difference between the two outputs, relative to them."""
        layer = self._adapter.base_layer
        with _standing_on(self._adapter, self._weight), _without_scale(layer):
            expected = self._adapter.delta(self._inputs, self._base).float()
        difference = float((expected - self._corrections).abs().max())
        scale = float(expected.abs().max())
        return difference / scale if scale else difference


@contextmanager
def _standing_on(adapter: Adapter, weight: Tensor) -> Iterator[None]:
    """Inside the block an adapter that reads its base finds ``weight`` there, and no bias."""
    if not adapter.reads_base:
        yield
        return
    layer, before = adapter.base_layer, (adapter.weight, adapter.bias)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if adapter.bias is not None:
        layer.register_parameter("bias", None)
    try:
        yield
    finally:
        layer.weight, bias = before
        if bias is not None:
            layer.bias = bias


@contextmanager
def _without_scale(layer: nn.Module) -> Iterator[None]:
    """Inside the block an embedding does not multiply its rows by a constant, as Gemma's does.

    The constant is not in the weight, and has no value where the base is without data.
    """
    scale = getattr(layer, "embed_scale", None)
    if scale is None:
        yield
        return
    layer.embed_scale = torch.ones(())
    try:
        yield
    finally:
        layer.embed_scale = scale


def row_slices(rows: int, columns: int, elements: int) -> Iterator[slice]:
    """Consecutive rows of a matrix, about ``elements`` numbers at a time."""
    step = max(1, elements // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _probe_inputs(adapter: Adapter) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if adapter.shape.kind is LayerKind.embedding:
        return torch.randint(0, adapter.shape.in_features, (PROBES,), generator=generator)
    experts = [adapter.shape.experts] if adapter.shape.is_stacked else []
    return torch.randn(*experts, PROBES, adapter.shape.in_features, generator=generator)
