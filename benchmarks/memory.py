"""Memory: what autograd keeps for the backward pass, and what a process held at its peak."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, input_ids: Tensor) -> int:
    """Bytes of all distinct storages that a backward pass through the model would need.

    Parameters and buffers are not counted.  The embedding's output is made to require a gradient,
    so that a frozen model too must carry gradients to every layer's input.
    """
    owned = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> None:
        # Nothing is handed back, as no backward pass comes: a node that keeps its own output
        # through a hook would never be freed.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being used again

    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(
        lambda _module, _inputs, output: output.detach().requires_grad_()
    )
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
            output = model(input_ids=input_ids, use_cache=False).logits
    finally:
        handle.remove()
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def fill_page_cache(folder: Path, last: Sequence[Path]) -> None:
    """Leave no memory unused: pages of a file of zeros take it, then those of ``last``.

    So it is on a machine that has been up for a while: who writes a file gets pages that were
    somebody's before.  A virtual machine that was just started, or that hands freed memory back,
    asks its host for every new page instead, at a tenth of the speed.
    """
    hole = folder / "hole"
    with hole.open("wb") as file:
        file.truncate(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    buffer = bytearray(8 << 20)
    for path in [hole, *last]:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


@dataclass(frozen=True)
class Finished:
    """A child process that ended well: wall and CPU time, standard output."""

    seconds: float
    cpu_seconds: float
    output: str


def run_measured(
    command: Sequence[str], environment: Mapping[str, str] | None = None, expect: int = 0
) -> Finished:
    """Run a command to its end.

    Raises:
        RuntimeError: with the end of what it said, if it exits otherwise than with ``expect``.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
        text=True,
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode != expect:
        raise RuntimeError(f"{command[:4]} ended with {process.returncode}:\n{output[-3000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return Finished(seconds, cpu, output)
