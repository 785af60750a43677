"""Out of memory, said in one line with what would help."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from loratune.errors import TrainingError

# What torch's CPU allocator, and the C++ library below it, say.
_SIGNS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "out of memory")


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
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _explained(error, where(), fix) from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _SIGNS):
            raise
        raise _explained(error, where(), fix) from error


def _explained(error: BaseException, where: str, fix: str) -> TrainingError:
    said = str(error).strip().splitlines()
    start = said[0].find("ried to allocate") if said else -1
    detail = f" (t{said[0][start:].rstrip()})" if start >= 0 else ""
    return TrainingError(f"out of memory{detail}", where=where, fix=fix)
