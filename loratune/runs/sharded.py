"""Tensors that the processes of a run share out by rows (torch's DTensor), each holding its own.

On a tensor that is whole on every process all functions are the identity, so that those who save,
check and measure what trains need not ask which it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from loratune.runs import processes


def is_shared_out(tensor: Tensor) -> bool:
    """Whether this process holds only some rows of a tensor."""
    return hasattr(tensor, "full_tensor")


def own_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor, in the very memory; it may have no rows."""
    part: Tensor = tensor.to_local() if is_shared_out(tensor) else tensor
    return part


def gathered(tensor: Any) -> Tensor:
    """The whole tensor.

    Collective where it is shared out: every process must call it, and gets a copy.
    """
    whole: Tensor = tensor.detach().full_tensor() if is_shared_out(tensor) else tensor
    return whole


def gather_for_main(tensors: Iterable[Tensor]) -> None:
    """Take part while the main process gathers these, in this order, one at a time."""
    for tensor in tensors:
        gathered(tensor)


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This process's rows of a whole tensor, if ``like`` is shared out."""
    return whole[rows_of(len(whole))] if is_shared_out(like) else whole


def shared_out_as(part: Tensor, like: Any) -> Tensor:
    """This process's rows as a tensor of the shape of ``like``, which is shared out."""
    # A second of imports, which a run on one device never needs.
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def rows_of(rows: int, rank: int | None = None) -> slice:
    """A process's rows of so many, this one's by default.

    As torch splits a tensor: the last ones may have none.
    """
    rank = processes.rank() if rank is None else rank
    each = -(-rows // processes.world_size())
    start = min(rank * each, rows)
    return slice(start, min(start + each, rows))


def anywhere(names: Iterable[str]) -> list[str]:
    """The names that any process gives, each once; collective."""
    return list(dict.fromkeys(name for own in processes.gather(list(names)) for name in own))
