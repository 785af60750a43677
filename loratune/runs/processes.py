"""What the processes of one run do together: sum, agree, gather.

With one process every function is the identity, so that the loop has no branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loratune.console import say


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


def say_once(*lines: str) -> None:
    """Print lines that all processes would say, on the main one alone."""
    if is_main():
        for line in lines:
            say(line)


def total(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over all processes, in double precision."""
    if not is_distributed():
        return list(values)
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.cpu()]


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum every gradient over all processes in one flat all-reduce per dtype.

    Adapters are small: one call is as fast as bucketed DDP and keeps the order of sums fixed.
    """
    if not is_distributed():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        assert parameter.grad is not None
        by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for grads in by_dtype.values():
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def gather(value: Any) -> list[Any]:
    """``value`` of every process, in rank order, on every process."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Process 0's ``value`` on every process."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    """Wait for all processes."""
    if is_distributed():
        dist.barrier()
