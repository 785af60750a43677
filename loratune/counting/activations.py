"""What autograd keeps for an adapter's backward pass, measured on one block of each kind.

The blocks have the model's real widths and random weights.  Gradients flow through the frozen base
in either case, so what the base itself keeps is subtracted.  torch is imported only here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loratune.adapters.config import AdapterConfig
from loratune.config.schema import TargetsConfig
from loratune.models.architectures import Architecture
from loratune.targets.find import find_targets
from loratune.targets.patterns import block_of, fitting_keys

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ActivationReport:
    """Bytes per token that autograd keeps for one block's backward pass, fp32.

    Attributes:
        base: kept by the frozen base, gradients flowing through it; the mean of the kinds.
        added: kept beyond that because of the adapters; the mean of the kinds that have any.
        modules: layer to what its adapter was the first to keep (an input that several adapters
            share counts for the first of them).
        tokens: how many tokens were run.
    """

    variant: str
    rank: int
    base: float
    added: float
    modules: Mapping[str, float]
    tokens: int


@dataclass
class _Kept:
    """Bytes of distinct storages that autograd packed, by the adapter that packed them first."""

    ignored: set[int]
    by_owner: dict[str, int] = field(default_factory=dict)
    owners: list[str] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    @property
    def total(self) -> int:
        return sum(self.by_owner.values())

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen | self.ignored:
            self.seen.add(storage.data_ptr())
            self.tensors.append(tensor)  # a freed storage's address could come back
            owner = self.owners[-1] if self.owners else ""
            self.by_owner[owner] = self.by_owner.get(owner, 0) + storage.nbytes()
        return tensor


def measure_activations(
    architecture: Architecture,
    targets: TargetsConfig,
    config: AdapterConfig,
    *,
    tokens: int = 64,
    dtype: torch.dtype | None = None,
) -> ActivationReport:
    """Run a block of each kind with and without adapters and compare what autograd keeps.

    Args:
        architecture: the model; its numbers build the blocks.
        targets: which layers; a selection of blocks is ignored.
        config: the variant, dropout included.
        tokens: length of the one sequence.
        dtype: number format of the base; fp32 by default.

    Raises:
        ModelError: if the targets match nothing in one block, or it cannot be built.
    """
    import torch

    from loratune.models.probes.layers import unusable_layers
    from loratune.surgery import wrap_model

    cut = replace(targets, layers=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = few_blocks(architecture)
        fitting, unusable = without_other_blocks(model, cut, config), unusable_layers(model)
        blocks = block_count(model)
        model = model.to(dtype or torch.float32)
        base = _keep(model, {}, tokens)
        wrapped = wrap_model(model, fitting, cut, seed=0, unusable=unusable, strict=False)
        for adapter in wrapped.adapters.values():
            adapter.train()
        kept = _keep(model, wrapped.adapters, tokens)
    modules = {name: kept.by_owner.get(name, 0) / tokens for name in wrapped.adapters}
    adapted = len({block_of(name) for name in modules} - {None}) or blocks
    added = (kept.total - base.total) / adapted / tokens
    each = base.total / blocks / tokens
    return ActivationReport(config.variant, config.rank, each, added, modules, tokens)


def few_blocks(architecture: Architecture) -> nn.Module:
    """The model with one block of each kind, frozen, in evaluation mode, with random weights."""
    from loratune.models.build import outline
    from loratune.models.probes.shortened import shortened

    return shortened(outline(architecture.numbers))


def block_count(model: nn.Module) -> int:
    """Blocks of a model that have layers, at least 1."""
    from loratune.models.measure import layer_shapes

    return max(1, len({block_of(shape.name) for shape in layer_shapes(model)} - {None}))


def without_other_blocks(
    model: nn.Module, targets: TargetsConfig, config: AdapterConfig
) -> AdapterConfig:
    """``config`` without the rank and alpha patterns of other blocks."""
    from loratune.models.measure import layer_shapes
    from loratune.models.probes.layers import unusable_layers

    family = str(getattr(getattr(model, "config", None), "model_type", ""))
    unusable = unusable_layers(model)
    shapes = layer_shapes(model)
    matched = find_targets(shapes, targets, family=family, unusable=unusable, strict=False).shapes
    names = [shape.name for shape in matched]

    def used(patterns: Mapping[str, Any]) -> dict[str, Any]:
        keys = set(fitting_keys(patterns, names, "adapter").values())
        return {key: value for key, value in patterns.items() if key in keys}

    ranks, alphas = used(config.rank_pattern), used(config.alpha_pattern)
    return replace(config, rank_pattern=ranks, alpha_pattern=alphas)


def _keep(model: nn.Module, owners: Mapping[str, nn.Module], tokens: int) -> _Kept:
    """Run ``tokens`` forward and collect what autograd keeps, weights apart."""
    import torch

    held = [*model.parameters(), *model.buffers()]
    kept = _Kept({tensor.untyped_storage().data_ptr() for tensor in held})
    ids = torch.zeros(1, tokens, dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor)
    with _gradient_from_the_input(model), _owned(kept, owners), hooks:
        output = model(input_ids=ids, use_cache=False)
    del output
    return kept


@contextmanager
def _gradient_from_the_input(model: nn.Module) -> Iterator[None]:
    """Let gradients flow through the whole block, as they do in the middle of a model."""

    def require(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        # A clone, since a model may change its states in place, and a leaf forbids that.
        return output if output.requires_grad else output.requires_grad_().clone()

    find: Callable[[], nn.Module] = model.get_input_embeddings  # type: ignore[assignment]
    handle = find().register_forward_hook(require)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _owned(kept: _Kept, owners: Mapping[str, nn.Module]) -> Iterator[None]:
    """Attribute what is packed inside an adapter's forward to that adapter."""
    handles = []
    for name, module in owners.items():

        def enter(module: nn.Module, inputs: object, name: str = name) -> None:
            kept.owners.append(name)

        def leave(module: Any, inputs: object, output: Tensor) -> None:
            kept.owners.pop()
            if module.shape.is_stacked:  # W + ΔW: as large as W, however many tokens there are
                kept.ignored.add(output.untyped_storage().data_ptr())
                kept.tensors.append(output)

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
