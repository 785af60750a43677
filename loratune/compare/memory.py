"""Bytes that one training step holds at its peak, counted by the allocator, not by the system.

The resident size of a process says little here: torch alone takes hundreds of megabytes, and
freed memory is kept.  The allocator's own events give the tensors' bytes exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def peak_bytes(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], object]
) -> int:
    """Weights, buffers and optimizer state, plus the most that ``step`` allocates beyond them.

    Args:
        model: adapters included.
        optimizer: after at least one step, so that its state exists.
        step: one whole training step; gradients are dropped before it.
    """
    optimizer.zero_grad(set_to_none=True)
    held = _bytes([*model.parameters(), *model.buffers(), *_state(optimizer)])
    device = next(model.parameters()).device
    return held + (_peak_cuda(device, step) if device.type == "cuda" else _peak_cpu(step))


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states: Iterable[dict[str, Any]] = optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages: tied weights count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _peak_cuda(device: torch.device, step: Callable[[], object]) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def _peak_cpu(step: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    recorded: Any = profiler.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
