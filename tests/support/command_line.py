"""`loratune` as a process of its own: started, given faults, signalled, waited for."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

PATIENCE = 180.0
"""Seconds after which a command that has not ended is a hang."""
ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Several cases run at the same time: one thread each."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended.  Unpacks into its code, output and error output.

    Attributes:
        code: exit status; minus the signal's number if one killed it.
        out: its standard output.
        err: its standard error.
        calls: what the faults `count`, `audit` and `deny` saw, in order.
        grown_bytes: how far its resident set grew beyond its size at the start; 0 if killed.
    """

    code: int
    out: str
    err: str
    calls: list[str]
    grown_bytes: int

    def __iter__(self) -> Iterator[Any]:
        return iter((self.code, self.out, self.err))

    @property
    def text(self) -> str:
        """Both streams."""
        return self.out + self.err

    @property
    def last(self) -> str:
        """The last line of stderr: what the user is told."""
        return (self.err.strip().splitlines() or [""])[-1]

    @property
    def errors(self) -> list[str]:
        """Every `error[CODE] ...` line."""
        return [line for line in self.err.splitlines() if line.startswith("error[")]

    @property
    def has_traceback(self) -> bool:
        """Whether a person would have to read a stack."""
        return "Traceback (most recent call last)" in self.text


@dataclass(frozen=True)
class Case:
    """A running `loratune`."""

    folder: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        return int(_wait_for(self.folder / "pid", PATIENCE))

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return (self.folder / "status").exists()

    def signal(self, number: int) -> None:
        """Send it a signal; one that has ended gets none."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait_until(self, path: Path) -> None:
        """Wait until the case has made `path`, or has ended."""
        deadline = time.monotonic() + PATIENCE
        while not path.exists() and not self.ended and time.monotonic() < deadline:
            time.sleep(0.002)

    def wait(self, timeout: float = PATIENCE) -> Outcome:
        """How it ended; one that hangs is killed and fails the test."""
        try:
            status = _wait_for(self.folder / "status", timeout)
        except TimeoutError:
            os.killpg(self.pid, 9)
            raise
        return Outcome(
            int(status),
            self._text("stdout"),
            self._text("stderr"),
            self._text("calls").splitlines(),
            int(self._text("grown") or 0),
        )

    def _text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _wait_for(path: Path, timeout: float) -> str:
    deadline = time.monotonic() + timeout
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} after {timeout} s: {path.parent}")
        time.sleep(0.002)
    return path.read_text()


class CommandLine:
    """Runs `loratune WORDS`: each a fork of one process that has imported everything.

    As with a subprocess, a case starts in the caller's folder with the caller's environment.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._numbers, self._lock = folder, count(), Lock()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ALONE},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == "ready"

    def start(
        self,
        *words: str,
        faults: Sequence[str] = (),
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> Case:
        """Start `loratune WORDS`.

        Args:
            words: what follows `loratune`.
            faults: what goes wrong (see `injection.py`).
            cwd: its working folder.
            environment: variables beside the caller's.
            limits: names and values for `resource.setrlimit`.
        """
        folder = self.folder / f"case-{next(self._numbers):05d}"
        folder.mkdir(parents=True)
        request = {
            "folder": str(folder),
            "cwd": str(cwd or Path.cwd()),
            "words": list(words),
            "faults": list(faults),
            "environment": {**os.environ, **ALONE, **(environment or {})},
            "limits": dict(limits or {}),
        }
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return Case(folder)

    def __call__(self, *words: str, timeout: float = PATIENCE, **options: Any) -> Outcome:
        """Run `loratune WORDS` to its end."""
        return self.start(*words, **options).wait(timeout)

    def succeeds(self, *words: str, **options: Any) -> Outcome:
        """Run a command that must succeed."""
        outcome = self(*words, **options)
        assert outcome.code == 0, outcome.err
        return outcome

    def refuses(self, *words: str, **options: Any) -> str:
        """Run a command that must fail in words, and return them on one line."""
        outcome = self(*words, **options)
        assert outcome.code not in (0, 1) and not outcome.has_traceback, outcome
        return " ".join(outcome.err.split())

    def close(self) -> None:
        """End the process; cases that still run go on."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.kill()
        self._process.wait(30)
        self._process.stdout.close()
