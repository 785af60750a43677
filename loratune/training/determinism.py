"""The same bits from the same rows: which kernels a training may use on CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from loratune.errors import TrainingError
from loratune.models.build import first_line


@contextlib.contextmanager
def repeatable_kernels(device: torch.device) -> Iterator[None]:
    """Inside, a backward pass gives the same bits every time; on a CPU it does anyway.

    Attention's backward kernels add up their parts in the order in which they finish, unless
    torch is told to be deterministic; told so, it refuses operations without such a kernel.

    Raises:
        TrainingError: naming an operation of the model that has no deterministic kernel.
    """
    if device.type != "cuda":
        yield
        return
    memory: Any = torch.utils.deterministic
    fills, mode = memory.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    # Filling every new tensor would cost a pass over it, and nothing here reads unwritten memory.
    memory.fill_uninitialized_memory = False
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise TrainingError(
            f"the model cannot be trained bit for bit alike on CUDA: {first_line(error)}",
            where="trainer.deterministic",
            fix="trainer.deterministic=false; a resumed run then differs in its last bits",
        ) from error
    finally:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fills
