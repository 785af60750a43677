"""Spread a model over the processes of a run (FSDP2), where one copy each does not fit.

The base is sharded before it has data; then every process reads its own rows of every parameter
from the files.  Weights that train themselves (full fine-tuning, trained modules) are sharded with
it, and so are their gradients and what an optimizer keeps of them.  Corrections stay whole on
every process: they are small, and their gradients are summed in one call.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from functools import wraps
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from loratune.errors import ConfigError
from loratune.models.probes.shortened import keep_outline
from loratune.models.reading import WHOLE
from loratune.models.unread import UnreadParameters
from loratune.runs import processes
from loratune.runs.sharded import rows_of, shared_out_as
from loratune.surgery import WrappedModel

_MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of malloc.h: allocations from so many bytes on are mapped one by one."""
_LARGE = 1 << 20
_SHARDED: WeakSet[nn.Module] = WeakSet()


def is_sharded(model: nn.Module) -> bool:
    """Whether all processes must run the model together."""
    return model in _SHARDED


def shard_base(wrapped: WrappedModel, unread: UnreadParameters) -> None:
    """Shard every block of the base, then what is left of it, and read this process's part.

    A block's weights are gathered just before it runs, forward and backward, and dropped after.
    The embedding and the output head are gathered for a whole step.  The gradients of what trains
    in a block are summed over the processes when its backward pass ends, and each process keeps
    its own rows of the sums.

    Args:
        wrapped: a model whose base has no data yet, nor has what trains in its place; corrections
            have theirs.
        unread: gives the base's parameters their values.

    Raises:
        ConfigError: a model without a list of blocks, or with embeddings of another size than the
            files'.
    """
    # A second of imports, which a run on one device never needs.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = wrapped.model
    if unread.device.type == "cpu":
        _free_at_once()
    keep_outline(model)
    _move_adapters(model, unread.device)
    places = list(_empty_parameters(model))
    backbone = getattr(model, "base_model", model)
    mesh = init_device_mesh(unread.device.type, (processes.world_size(),))
    whole = _whole_parameters(wrapped)
    for part in (*_blocks(backbone), model):
        part.register_forward_hook(_without_views)
        _sum_gradients(fully_shard(part, mesh=mesh, ignored_params=whole))
    if backbone is not model:
        _gather_for(backbone, model)
    _fill(places, unread)
    _SHARDED.add(model)


def _free_at_once() -> None:
    """Let glibc give the memory of a large tensor back as soon as it is freed.

    By itself it holds on to tensors of up to 32 MB, and gathered weights, which are aligned, do
    not fit into the room of freed ones of their own size: with every block it took more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)


def _without_views(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A part's outputs, copied where they are views of other tensors.

    A model may add to a view in place, and backward would then run without the gathered weights.
    """
    return tree_map_only(Tensor, lambda one: one if one._base is None else one.clone(), output)


def _gather_for(backbone: Any, model: Any) -> None:
    """What is not in a block is gathered too where the backbone is called without its model.

    The head runs after it, on the rows that have a loss; not every model calls its backbone.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    forward = backbone.forward

    @wraps(forward)
    def run(*inputs: Any, **named: Any) -> Any:
        return _without_views(backbone, inputs, forward(*inputs, **named))

    model.run_backbone = run
    register_fsdp_forward_method(model, "run_backbone")
    backbone.forward = model.run_backbone


def _sum_gradients(part: Any) -> None:
    """Sums, not means; and of every weight, where a process's rows did not use it as well."""
    part.set_gradient_divide_factor(1.0)
    part.set_force_sum_reduction_for_comms(True)
    part.set_reduce_scatter_unused_params(True, recurse=False)


def drop_gathered(model: nn.Module) -> None:
    """Drop what a forward pass without a backward one left gathered: each its own part again."""
    if is_sharded(model):
        model.reshard()  # type: ignore[operator]


def _move_adapters(model: nn.Module, device: torch.device) -> None:
    """Put everything that has data where the base is to be."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(device)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)


Place = tuple[nn.Module, str, nn.Parameter]
"""A module, its name for a parameter, and the parameter as it is before the base is sharded."""


def _empty_parameters(model: nn.Module) -> Iterator[Place]:
    """Every place of a parameter without data; one that is tied has several."""
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                yield module, key, parameter


def _whole_parameters(wrapped: WrappedModel) -> set[nn.Parameter]:
    """What has data already (corrections); single numbers; embeddings of which some rows train.

    The last are read as a whole, with those rows in them.
    """
    model = wrapped.model
    whole = {p for p in model.parameters() if not p.is_meta or not p.dim()}
    for rows in wrapped.token_rows.values():
        whole |= set(rows.original_module.parameters())
    return whole


def _blocks(backbone: nn.Module) -> list[nn.Module]:
    """The transformer's blocks: the longest list of modules of one type."""
    lists = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ConfigError("the model has no list of blocks to shard", where="launch.shard")
    longest = max(lists, key=lambda blocks: len(blocks))
    return list(longest)


def _fill(places: Iterable[Place], unread: UnreadParameters) -> None:
    """Read this process's rows of every sharded parameter, and all of those that are whole.

    Raises:
        ConfigError: for a parameter that is not as in the files.
    """
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for module, key, empty in places:
        if empty not in filled:
            if empty not in unread:
                raise ConfigError(
                    "the adapter brings embeddings of another size, which a sharded base cannot "
                    "take up",
                    where="launch.shard",
                    fix="launch.shard=false, or merge the adapter and continue from the merged "
                    "model",
                )
            filled[empty] = _read(empty, module._parameters[key], unread)
        module._parameters[key] = filled[empty]


def _read(empty: nn.Parameter, wanted: Any, unread: UnreadParameters) -> nn.Parameter:
    """A parameter with its values: this process's rows of it where ``wanted`` is sharded.

    A copy that trains is fp32, whatever is read.
    """
    from torch.distributed.tensor import DTensor

    is_sharded = isinstance(wanted, DTensor)
    value = unread.read(empty, rows_of(len(empty)) if is_sharded else WHOLE).to(unread.device)
    value = value.float() if empty.requires_grad else value
    value = shared_out_as(value, wanted) if is_sharded else value
    return nn.Parameter(value, requires_grad=empty.requires_grad)
