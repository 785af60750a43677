"""The next step's batches, made ready while the device works on this one's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from loratune.data.collate import Batch


class Prefetch:
    """Batches by step number.

    On CUDA the next step's batches are collated into pinned memory by a second thread and copied
    without waiting.  On a CPU that thread would only take time from the arithmetic: there each
    step's batches are made when it begins.

    Args:
        build: step number to this process's batches, on the CPU.
        device: where the model is.
    """

    def __init__(self, build: Callable[[int], list[Batch]], device: torch.device) -> None:
        self._build, self._device = build, device
        self._pool = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def batches(self, step: int) -> list[Batch]:
        """The batches of a step, on the device; the next step's are begun."""
        if self._pool is None:
            return [batch.to(self._device) for batch in self._build(step)]
        ready = self._next[1] if self._next and self._next[0] == step else None
        batches = ready.result() if ready else self._pinned(step)
        self._next = (step + 1, self._pool.submit(self._pinned, step + 1))
        return [batch.to(self._device, non_blocking=True) for batch in batches]

    def _pinned(self, step: int) -> list[Batch]:
        return [batch.pinned() for batch in self._build(step)]

    def close(self) -> None:
        """End the second thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
