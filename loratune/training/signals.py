"""SIGTERM and SIGINT stop a run where it can be resumed; a second SIGINT stops it at once.

So does a signal of its own with which the launcher asks for a save (submitit's SIGUSR2).
"""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.errors import Interrupted, LoratuneError, Preempted

_WATCHED = (signal.SIGTERM, signal.SIGINT)
_LAUNCHERS = (signal.SIGUSR1, signal.SIGUSR2)
"""Watched where something handles them already, which otherwise would end the run unsaved."""


def stopped(number: int, step: int, run: Path) -> LoratuneError:
    """What a run that signal ``number`` ended says: where it was saved, and how it goes on."""
    command = f"resume with: loratune train resume={shlex.quote(str(run))}"
    if number == signal.SIGINT:
        return Interrupted(f"interrupted; saved at step {step}", fix=command)
    return Preempted(f"preempted at step {step}, saved", fix=command)


def _is_handled(number: signal.Signals) -> bool:
    return callable(signal.getsignal(number))


@contextmanager
def _handled_by(receive: Callable[[int], None]) -> Iterator[None]:
    """Inside the block ``receive`` handles the signals instead of ending the process."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (*_WATCHED, *filter(_is_handled, _LAUNCHERS)):
            before[number] = signal.signal(number, lambda received, _: receive(received))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class StopRequest:
    """A signal that was noted, for the loop to save and stop after the step; 0 while there is none.

    A launcher and a terminal may both pass on one Ctrl-C: only a process that nobody else watches
    takes a second one for impatience.
    """

    received: int = 0

    def receive(self, number: int) -> None:
        """Note a signal."""
        if self.received == signal.SIGINT and number == signal.SIGINT and "RANK" not in os.environ:
            os._exit(130)  # published checkpoints are whole, nothing else matters
        self.received = max(self.received, number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While training: inside the block signals are only noted."""
    request = StopRequest()
    with _handled_by(request.receive):
        yield request


@contextmanager
def stop_at_once(step: int, run: Path) -> Iterator[None]:
    """After training, when everything is saved: signals end the run where it stands.

    What is half written is removed on the way out.
    """

    def receive(number: int) -> None:
        raise stopped(number, step, run)

    with _handled_by(receive):
        yield
