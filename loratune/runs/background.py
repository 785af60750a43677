"""Calls that may never return: over a network that is cut, or to a program that never answers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

_T = TypeVar("_T")


def in_background(function: Callable[[], _T]) -> Future[_T]:
    """``function()`` in a thread that does not keep the process from ending."""
    future: Future[_T] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    Thread(target=call, daemon=True).start()
    return future


def within(seconds: float, function: Callable[[], _T]) -> _T | None:
    """What ``function`` returns, or ``None`` if it fails (as torch's stores do) or takes longer."""
    try:
        return in_background(function).result(seconds)
    except (RuntimeError, TimeoutError):
        return None
