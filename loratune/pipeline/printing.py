"""Lines that all processes of a run would say, printed once."""

from __future__ import annotations

from loratune.console import say
from loratune.runs import processes


def say_once(*lines: str) -> None:
    """Print lines on the main process."""
    if processes.is_main():
        for line in lines:
            say(line)
