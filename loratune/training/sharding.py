"""Spread the frozen base over the processes of a run (FSDP2), where one copy each does not fit.

Adapters stay whole on every process: they are small, and their gradients are summed in one call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from loratune.errors import ConfigError
from loratune.runs import processes
from loratune.surgery import WrappedModel
from loratune.training.state import adapter_tensors


def shard_base(wrapped: WrappedModel) -> None:
    """Shard every block of the base, then what is left of its backbone.

    A block's weights are gathered just before it runs, forward and backward, and dropped after.

    Raises:
        ConfigError: with a single process, or a model without a list of blocks.
    """
    # A second of imports, which a run on one device never needs.
    from torch.distributed.fsdp import fully_shard

    if processes.world_size() < 2:
        raise ConfigError(
            "launch.shard has no effect with one process",
            where="launch.shard",
            fix="launch.nproc=N",
        )
    backbone = getattr(wrapped.model, "base_model", wrapped.model)
    whole = _whole_parameters(wrapped)
    for part in (*_blocks(backbone), backbone):
        part.register_forward_hook(_without_views)
        fully_shard(part, ignored_params=whole)


def _without_views(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A part's outputs, copied where they are views of other tensors.

    A model may add to a view in place, and backward would then run without the gathered weights.
    """
    return tree_map_only(Tensor, lambda one: one if one._base is None else one.clone(), output)


def _whole_parameters(wrapped: WrappedModel) -> set[nn.Parameter]:
    """What trains, what an adapter keeps frozen, and embeddings of which some rows train.

    The second is stored with what trains; the last is read as a whole, with those rows in it.
    """
    own = {tensor.data_ptr() for tensor in adapter_tensors(wrapped).values()}
    own |= {p.data_ptr() for rows in wrapped.token_rows.values() for p in rows.parameters()}
    return {p for p in wrapped.model.parameters() if p.requires_grad or p.data_ptr() in own}


def _blocks(backbone: nn.Module) -> list[nn.Module]:
    """The transformer's blocks: the longest list of modules of one type."""
    lists = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ConfigError("the model has no list of blocks to shard", where="launch.shard")
    longest = max(lists, key=lambda blocks: len(blocks))
    return list(longest)
