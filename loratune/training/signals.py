"""SIGTERM and SIGINT stop a run where it can be resumed; a second SIGINT stops it at once."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from abc import ABC, abstractmethod
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from loratune.errors import Interrupted, LoratuneError, Preempted

_WATCHED = (signal.SIGTERM, signal.SIGINT)


def stopped(number: int, step: int, run: Path) -> LoratuneError:
    """What a run that signal ``number`` ended says: where it was saved, and how it goes on."""
    command = f"resume with: loratune train resume={shlex.quote(str(run))}"
    if number == signal.SIGINT:
        return Interrupted(f"interrupted; saved at step {step}", fix=command)
    return Preempted(f"preempted at step {step}, saved", fix=command)


class _Handlers(ABC):
    """Inside the block, ``receive`` handles the signals instead of ending the process."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _WATCHED:
                self._before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @abstractmethod
    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""


class StopRequest(_Handlers):
    """While training: signals are noted, for the loop to save and stop after the step.

    Attributes:
        received: number of the signal, 0 while there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received = 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note it.  A launcher and a terminal may both pass on one Ctrl-C: only a process that
        nobody else watches takes a second one for impatience.
        """
        if self.received == signal.SIGINT and number == signal.SIGINT and "RANK" not in os.environ:
            os._exit(130)  # published checkpoints are whole, nothing else matters
        self.received = max(self.received, number)


class StopAtOnce(_Handlers):
    """After training, when everything is saved: signals end the run where it stands."""

    def __init__(self, step: int, run: Path) -> None:
        super().__init__()
        self.step, self.run = step, run

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Stop; what is half written is removed on the way out."""
        raise stopped(number, self.step, self.run)
