"""The command line within this process: its words in, its exit code and output back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROWS = [
    {"prompt": f"Say {word}.", "completion": f" {word} {word}"}
    for word in ("red", "blue", "green", "grey", "pink", "teal", "gold", "lime")
]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


class CommandLine:
    """Runs commands in a folder of its own."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capture = folder, capture

    def __call__(self, *words: str) -> Outcome:
        from loratune.cli.dispatch import dispatch

        self._capture.readouterr()
        code = dispatch(words[0], list(words[1:]))
        printed = self._capture.readouterr()
        return Outcome(code, printed.out, printed.err)

    def succeeds(self, *words: str) -> Outcome:
        """Run a command that must succeed."""
        outcome = self(*words)
        assert outcome.code == 0, outcome.err
        return outcome

    def refuses(self, *words: str) -> str:
        """Run a command that must fail in words, and return them on one line."""
        outcome = self(*words)
        assert outcome.code not in (0, 1), outcome
        assert "Traceback" not in outcome.err
        return " ".join(outcome.err.split())


def write_rows(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """A jsonl file of prompt and completion rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS), encoding="utf-8")
    return path
