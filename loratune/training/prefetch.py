"""The next step's batches, made ready while the device works on this one's."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import torch

from loratune.data.collate import Batch


def prefetched(
    build: Callable[[int], list[Batch]], steps: range, device: torch.device
) -> Generator[list[Batch], None, None]:
    """The batches of every step, on the device.

    On CUDA the next step's batches are collated into pinned memory by a second thread and copied
    without waiting.  On a CPU that thread would only take time from the arithmetic: there each
    step's batches are made when it begins.

    Args:
        build: step number to this process's batches, on the CPU.
        steps: numbers of the steps.
        device: where the model is.
    """
    if device.type != "cuda":
        for step in steps:
            yield [batch.to(device) for batch in build(step)]
        return

    def pinned(step: int) -> list[Batch]:
        return [batch.pinned() for batch in build(step)]

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(pinned, steps.start)
        for step in steps:
            batches = following.result()
            following = pool.submit(pinned, step + 1)
            yield [batch.to(device, non_blocking=True) for batch in batches]
