"""What one examination of the installation shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from loratune.errors import LoratuneError


class Status(StrEnum):
    """ok; warn: works, but not as well as it could; fail: will not work, or not safely."""

    ok = "ok"
    warn = "warn"
    fail = "fail"


@dataclass(frozen=True)
class Finding:
    """One examination.

    Attributes:
        name: what was examined.
        status: how it is.
        detail: what was seen.
        fix: what to do about it; empty if nothing.
        code: exit code that a failure asks for.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""
    code: int = 4


def examine(name: str, look: Callable[[], str], fix: str = "see the message") -> Finding:
    """Run one examination that either says what it saw or raises."""
    try:
        return Finding(name, Status.ok, look())
    except LoratuneError as error:
        return Finding(name, Status.fail, error.cause, error.fix or fix, error.exit_code)
    except Exception as error:  # whatever goes wrong here is the finding
        first = (str(error).strip().splitlines() or [""])[0][:200]
        return Finding(name, Status.fail, f"{type(error).__name__}: {first}", fix)
