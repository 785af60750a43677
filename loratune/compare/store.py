"""A comparison's folder: one file for each finished task, and who is working on what.

A result is written whole or not at all and never changes, so any number of processes, on any number
of machines that see the folder, can share the work and be killed at any time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune import files
from loratune.data.clock import is_moment
from loratune.errors import CheckpointError, SecurityError
from loratune.runs.output import TASK

CLOCK = "clock.json"
RESULT = "comparison.json"
MARKDOWN = "comparison.md"
KINDS = ("base", "costs", "trials", "members")
FAILED = "failed"
"""Key of a task's result that says why it failed."""
SECONDS = "seconds"
"""Key of a stored result that says how long the task took."""
MOST_DEATHS = 2
"""A task whose process died this often is given up: it would kill every process in turn."""


def fingerprint(value: Any) -> str:
    """Hex sha256 of plain values, whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class CachedResult:
    """Where the result of a task lies.

    Attributes:
        kind: one of ``KINDS``.
        label: of the setting, or an empty string.
        name: among its like.
        key: fingerprint of everything the result depends on.
    """

    kind: str
    label: str
    name: str
    key: str

    @property
    def file(self) -> str:
        """Its file's name below the folder; another key is another file."""
        parts = [self.kind, *([self.label] if self.label else []), f"{self.name}-{self.key[:10]}"]
        return "/".join(parts) + ".json"


class Store:
    """Results of tasks in a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: dict[str, dict[str, Any]] = {}

    @classmethod
    def open(cls, path: Path, shared: dict[str, Any]) -> Store:
        """Make the folder, or take it up again.

        Args:
            path: the folder.
            shared: what all tasks share; anything else needs another folder.

        Raises:
            CheckpointError: if the folder holds another comparison.
            SecurityError: if it is a symbolic link.
        """
        if path.is_symlink():
            cause = "the folder is a symbolic link"
            raise SecurityError(cause, where=str(path), fix="name it itself")
        store = cls(path)
        with files.storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            with store._locked("task"):
                if not (path / TASK).exists():
                    files.write_json(path / TASK, shared)
        stored = store._json(path / TASK)
        if stored != shared:
            changed = [key for key in shared if (stored or {}).get(key) != shared[key]]
            raise CheckpointError(
                f"the folder holds another comparison: {', '.join(changed[:4])} differ",
                where=str(path),
                fix="choose another out=DIR",
            )
        return store

    def clock(self, moment: str) -> str:
        """The moment that the comparison takes for now: that of the process that asked first.

        Raises:
            CheckpointError: if the record of it is damaged.
        """
        path = self.path / CLOCK
        with files.storage_errors(path), self._locked("clock"):
            if not path.exists():
                files.write_json(path, {"clock": moment})
        recorded = (self._json(path) or {}).get("clock")
        if not is_moment(recorded):
            fix = "restore it, or choose another out=DIR"
            raise CheckpointError("the recorded time is damaged", where=str(path), fix=fix)
        return str(recorded)

    def read(self, cached: CachedResult) -> dict[str, Any] | None:
        """A task's result without its duration, or ``None`` while there is none."""
        if cached.file not in self._read:
            value = self._json(self.path / cached.file)
            if value is None:
                return None
            self._read[cached.file] = {k: v for k, v in value.items() if k != SECONDS}
        return self._read[cached.file]

    def write(self, cached: CachedResult, result: dict[str, Any]) -> None:
        """Publish a task's result."""
        path = self.path / cached.file
        with files.storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, result)

    def finished(self) -> list[dict[str, Any]]:
        """Every result in the folder, of other rates and seeds too."""
        paths = (path for kind in KINDS for path in self.path.glob(f"{kind}/**/*.json"))
        return [value for path in paths if (value := self._json(path)) is not None]

    def forget(self, cached: CachedResult) -> None:
        """Remove a task's result, so that it is done again."""
        self._read.pop(cached.file, None)
        (self.path / cached.file).unlink(missing_ok=True)

    @contextlib.contextmanager
    def claim(self, cached: CachedResult) -> Iterator[int | None]:
        """Hold a task while working on it.

        Yields:
            ``None`` if another process holds it; else how many processes died on it before.
        """
        name = cached.file.removesuffix(".json").replace("/", "_")
        with self._locked(name, wait=False) as lock:
            if lock is None:
                yield None
                return
            lock.seek(0)
            deaths = len(lock.read())
            lock.write("x")
            lock.flush()
            try:
                yield deaths
            finally:
                lock.truncate(0)

    @contextlib.contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[Any]:
        """An exclusive lock that the system releases with the process."""
        folder = self.path / ".claims"
        folder.mkdir(exist_ok=True)
        with files.open_own(folder / name, os.O_RDWR | os.O_APPEND, "a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            yield lock

    @staticmethod
    def _json(path: Path) -> dict[str, Any] | None:
        """A file's object; ``None`` where it is missing or damaged."""
        try:
            value = files.read_json(path)
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None
