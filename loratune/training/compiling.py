"""What torch.compile refuses, said in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from loratune.errors import TrainingError


@contextlib.contextmanager
def compile_errors() -> Iterator[None]:
    """Turn what the compiler raises in the block, at its first call, into one error.

    Raises:
        TrainingError: with the compiler's own reason.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_compilers(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"torch.compile failed: {reason}",
            where="trainer.compile",
            fix="install what it names, or trainer.compile=false",
        ) from error


def _is_compilers(error: BaseException) -> bool:
    # By name: importing the compiler only to ask would cost more than most runs' start.
    return any(kind.__module__.startswith("torch._dynamo") for kind in type(error).__mro__)
