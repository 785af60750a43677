"""One run, one folder: every path named once, and a lock that says whose folder it is."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import IO, Any

from loratune import files
from loratune.config.convert import run_fields, to_plain
from loratune.config.schema import RunConfig
from loratune.config.secrets import redact
from loratune.errors import BusyError, ConfigError, SecurityError, StorageError


class RunDir:
    """The folder of one run (see ``create`` and ``open``)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.provenance = path / "provenance.json"
        self.parameters = path / "parameters.json"
        self.metrics = path / "metrics.jsonl"
        self.timings = path / "timings.jsonl"
        self.data = path / "data.json"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.evaluation = path / "evaluation.json"
        self.merged = path / "merged"
        self.export = path / "export"
        self.report = path / "report.html"
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, config: RunConfig) -> RunDir:
        """Make (or, with ``resume``, reopen) the run's folder and hold it for this process.

        Raises:
            BusyError: if another live process holds it, or another run's results lie in it.
            StorageError: if it cannot be written.
        """
        if config.out is None:
            path = _fresh_folder(Path("outputs") / config.name)
        else:
            path = Path(config.out)
            _refuse_link(path)
            with files.storage_errors(path):
                path.mkdir(parents=True, exist_ok=True)
        run_dir = cls(path)
        run_dir.hold()
        return run_dir

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """An existing run's folder.

        Raises:
            ConfigError: if it is not one.
        """
        run_dir = cls(Path(path))
        if not run_dir.recipe.is_file():
            raise ConfigError(
                "this is no run folder: it has no recipe.yaml",
                where=str(path),
                fix="name a folder that `loratune train` made",
            )
        return run_dir

    def hold(self) -> None:
        """Hold the folder until this process ends; a dead holder blocks nobody.

        Raises:
            BusyError: naming the holder's process, machine and start.
        """
        with files.storage_errors(self.path):
            lock = (self.path / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown process"
            lock.close()
            raise BusyError(
                f"the run folder is in use by {holder}",
                where=str(self.path),
                fix="wait for it, or choose another out=DIR",
            ) from error
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {started}")
        lock.flush()
        self._lock = lock

    def release(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def refuse_occupied(self) -> None:
        """Stop rather than mix two runs.

        Raises:
            BusyError: if results of an earlier run lie here.
        """
        if self.recipe.exists():
            raise BusyError(
                f"the folder holds an earlier run ({self.describe()})",
                where=str(self.path),
                fix="continue it with resume=auto, or choose another out=DIR",
            )

    def describe(self) -> str:
        """``step 12`` or what else is known of the run that lies here."""
        from loratune.checkpoint import published_checkpoints

        names = [path.name for path in published_checkpoints(self.checkpoints)]
        return f"newest checkpoint {names[-1]}" if names else "no checkpoint yet"

    def write_recipe(self, config: RunConfig) -> None:
        """The resolved recipe, reloadable, without secrets."""
        import yaml

        values = redact(run_fields(to_plain(config)))
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        files.write_text(self.recipe, text)

    def append(self, path: Path, record: dict[str, Any]) -> None:
        """Add one line to a jsonl file."""
        with files.storage_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=True) + "\n")

    def truncate_after(self, path: Path, step: int) -> None:
        """Drop the lines of a jsonl file that a resumed run will write again."""
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("step", 0) <= step:
                kept.append(line)
        files.write_text(path, "".join(line + "\n" for line in kept))

    def link_latest(self) -> None:
        """``outputs/NAME/latest`` points to this run; only a convenience, so never an error."""
        link = self.path.parent / "latest"
        temporary = link.with_name(f"{files.TEMPORARY_PREFIX}latest-{os.getpid()}")
        try:
            if link.exists() and not link.is_symlink():
                return
            temporary.symlink_to(self.path.name)
            os.replace(temporary, link)
        except OSError:
            temporary.unlink(missing_ok=True)


def _fresh_folder(parent: Path) -> Path:
    """A new folder ``<time>-<hash>``; exclusive, so that ten starts in a second get ten."""
    with files.storage_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for _ in range(100):
            stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
            path = parent / f"{stamp}-{secrets.token_hex(3)}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
    raise StorageError("could not make a new run folder", where=str(parent))


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise SecurityError(
            "the run folder is a symbolic link", where=str(path), fix="name the folder itself"
        )
    if path.exists() and not path.is_dir():
        raise StorageError("the run folder's name is a file", where=str(path), fix="choose out=DIR")
