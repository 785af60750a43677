"""What torch cannot do, in one line with what would help: memory that ran out, the compiler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from loratune.errors import TrainingError

# What torch's CPU allocator, and the C++ library below it, say.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "std::bad_alloc", "out of memory")


@contextlib.contextmanager
def memory_errors(where: Callable[[], str], fix: str) -> Iterator[None]:
    """Turn every kind of out-of-memory error of the block into one.

    Args:
        where: says, at the time of the error, what was being computed.
        fix: what to do about it.

    Raises:
        TrainingError: naming what was asked of the machine.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise TrainingError(f"out of memory{_request(error)}", where=where(), fix=fix) from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(sign in str(error) for sign in _OUT_OF_MEMORY)


def _request(error: BaseException) -> str:
    """What was asked for, where torch says it."""
    lines = str(error).strip().splitlines()
    start = lines[0].find("ried to allocate") if lines else -1
    return f" (t{lines[0][start:].rstrip()})" if start >= 0 else ""


@contextlib.contextmanager
def compile_errors() -> Iterator[None]:
    """Turn what torch.compile raises in the block, at its first call, into one error.

    Raises:
        TrainingError: with the compiler's own reason.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_compilers(error):
            raise
        inner = getattr(error, "inner_exception", error)  # the backend's, without the wrapping
        reason = str(inner).strip().splitlines()[0]
        raise TrainingError(
            f"torch.compile failed: {reason}",
            where="trainer.compile",
            fix="install what it names, or trainer.compile=false",
        ) from error


def _is_compilers(error: BaseException) -> bool:
    # By name: importing the compiler only to ask would cost more than most runs' start.
    return any(kind.__module__.startswith("torch._dynamo") for kind in type(error).__mro__)
