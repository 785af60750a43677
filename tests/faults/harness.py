"""Run `loratune` as a process, with faults, and look at what it left."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

PATIENCE = 180.0
"""Seconds after which a case that has not ended is a hang."""


@dataclass
class Outcome:
    """How a case ended.

    Attributes:
        code: exit status; minus the signal's number if one killed it.
        out: its standard output.
        err: its standard error.
        seconds: how long it took.
        calls: targets of a `count` fault, in the order of their calls.
    """

    code: int
    out: str
    err: str
    seconds: float
    calls: list[str]

    @property
    def last(self) -> str:
        """The last line of stderr: what the user is told."""
        lines = self.err.strip().splitlines()
        return lines[-1] if lines else ""

    @property
    def has_traceback(self) -> bool:
        """Whether a person would have to read a stack."""
        return "Traceback (most recent call last)" in self.err + self.out


@dataclass
class Case:
    """A running `loratune`."""

    folder: Path
    started: float = field(default_factory=time.monotonic)

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

    def wait(self, patience: float = PATIENCE) -> Outcome:
        """How it ended; one that hangs is killed and fails the test."""
        try:
            status = _wait_for(self.folder / "status", patience)
        except TimeoutError:
            os.killpg(self.pid, 9)
            raise
        calls = self.folder / "calls"
        return Outcome(
            int(status),
            (self.folder / "stdout").read_text(errors="replace"),
            (self.folder / "stderr").read_text(errors="replace"),
            time.monotonic() - self.started,
            calls.read_text().splitlines() if calls.exists() else [],
        )


def _wait_for(path: Path, patience: float) -> str:
    deadline = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} after {patience} s: {path.parent}")
        time.sleep(0.002)
    return path.read_text()


class Zygote:
    """The process that forks the cases (see `zygote.py`)."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._numbers, self._lock = folder, count(), Lock()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == "ready"

    def start(
        self,
        words: Sequence[str],
        *,
        faults: Sequence[str] = (),
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> Case:
        """Start `loratune WORDS` in a process of its own."""
        folder = self.folder / f"case-{next(self._numbers):05d}"
        folder.mkdir(parents=True)
        request = {
            "folder": str(folder),
            "cwd": str(cwd or folder),
            "words": list(words),
            "faults": list(faults),
            "environment": dict(environment or {}),
            "limits": dict(limits or {}),
        }
        case = Case(folder)
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return case

    def run(self, words: Sequence[str], **options: Any) -> Outcome:
        """Run `loratune WORDS` to its end."""
        return self.start(words, **options).wait()

    def close(self) -> None:
        """End the process; cases that still run go on."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.kill()
        self._process.wait(30)
        self._process.stdout.close()


def in_parallel(function: Any, items: Iterable[Any]) -> list[Any]:
    """`function(item)` of every item, two at a time, in order; the first exception is raised."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def tree(folder: Path) -> dict[str, str]:
    """Relative path to sha256 of every file (or target of every link) below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


REPRODUCIBLE = ("adapter", "checkpoints", "merged", "metrics.jsonl", "evaluation.json")
"""What two runs of one recipe must share byte for byte."""
_TIMED = ("merge_report.json",)


def result(run: Path) -> dict[str, str]:
    """The reproducible part of a run folder: path to sha256."""
    return {
        name: value
        for name, value in tree(run).items()
        if name.split("/")[0] in REPRODUCIBLE and not name.endswith(_TIMED)
    }


def differences(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """Names whose bytes differ, or that only one of them has."""
    names = sorted(first.keys() | second.keys())
    return [name for name in names if first.get(name) != second.get(name)]


def leftovers(run: Path) -> list[str]:
    """Temporary names anywhere in a run folder."""
    return [str(path.relative_to(run)) for path in run.rglob(".tmp-*")]
