"""The one rich console, and text from data made harmless before it is shown."""

from __future__ import annotations

import os
import sys
import unicodedata
from functools import cache
from typing import TYPE_CHECKING

_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""Unicode's controls, formats, half pairs, private use, and ends of lines and paragraphs."""

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> Console:
    """Standard output: colours and live progress on a terminal, plain lines in pipes and CI.

    Markup, emoji and automatic highlighting are off: text from data stays text.
    """
    from rich.console import Console

    class LastingConsole(Console):
        """A reader that goes away (head, less) ends the output, never the run behind it."""

        def on_broken_pipe(self) -> None:
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "120"))
    return LastingConsole(markup=False, emoji=False, highlight=False, width=width)


def is_interactive() -> bool:
    """Whether a person is watching: a terminal, and not a CI job."""
    return console().is_terminal and not os.environ.get("CI")


def printable(text: str) -> str:
    """``text`` with control characters (escape sequences, bells, returns, separators) visible.

    Line breaks and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(character if _harmless(character) else escaped(character) for character in text)


def _harmless(character: str) -> bool:
    return character in "\n\t" or unicodedata.category(character) not in _UNSEEN


def escaped(character: str) -> str:
    """A character by its number, as Python writes it."""
    return character.encode("unicode_escape").decode("ascii")


def say(text: str = "") -> None:
    """Print one line of plain text."""
    console().print(printable(text), soft_wrap=True)
