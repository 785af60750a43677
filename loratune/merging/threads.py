"""Several tensors at a time, each worked on by a thread of its own, results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

WORKERS = 2
"""Tensors that are worked on at the same time: each takes memory of its size."""
Result = TypeVar("Result")


@contextmanager
def tensor_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads for work on different tensors, one more than that for waiting on the disk.

    Torch is kept from splitting an operation meanwhile: its threads would fight with these.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max_workers=WORKERS + 1) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def in_order(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """The jobs' results in their order, a few of them in the making."""
    waiting: deque[Future[Result]] = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) > WORKERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
