"""SIGTERM and SIGINT ask the loop to save and stop; a second SIGINT stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_WATCHED = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Inside the block, signals set ``received`` instead of ending the process.

    Attributes:
        received: number of the signal, 0 while there is none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _WATCHED:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT and number == signal.SIGINT:
            os._exit(130)  # asked twice: published checkpoints are whole, nothing else matters
        self.received = max(self.received, number)
