"""One run, one folder: every path named once, and a lock that says whose folder it is."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from loratune import files
from loratune.config.convert import run_fields, to_plain
from loratune.config.schema import RunConfig
from loratune.config.secrets import redact
from loratune.errors import BusyError, ConfigError, SecurityError, StorageError

SUMMARY = "summary.json"
# What may still change when the run is over: the report is drawn again, the lock is reused.
_NOT_SEALED = (SUMMARY, ".lock", "report.html")


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
        self.summary = path / SUMMARY
        self.lock = path / ".lock"
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, config: RunConfig) -> RunDir:
        """Make (or, with ``resume``, reopen) the run's folder and hold it for this process.

        Raises:
            BusyError: if another live process holds it, or another run's results lie in it.
            StorageError: if it cannot be written.
        """
        if config.out is None:
            path = fresh_folder(Path("outputs") / config.name)
        else:
            path = Path(config.out)
            _refuse_link(path)
            if config.resume is None:
                cls(path).refuse_occupied()
            with files.storage_errors(path):
                path.mkdir(parents=True, exist_ok=True)
        run_dir = cls(path)
        run_dir.hold()
        try:
            if config.resume is None:
                run_dir.refuse_occupied()  # again: another start may have been quicker
        except BusyError:
            run_dir.release()
            raise
        return run_dir

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """What ``create`` would refuse, found without torch and without writing anything.

        Raises:
            BusyError: if another live process holds the folder, or another run lies in it.
            StorageError: if it cannot be written.
        """
        if config.out is None:
            return
        run_dir = cls(Path(config.out))
        _refuse_link(run_dir.path)
        if config.resume is None:
            run_dir.refuse_occupied()
        run_dir.refuse_busy()
        _refuse_unwritable(run_dir.path)

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
            lock = self.lock.open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise self._busy(lock) from error
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {started}")
        lock.flush()
        self._lock = lock

    def refuse_busy(self) -> None:
        """Stop if a living process holds the folder; take nothing, change nothing.

        Raises:
            BusyError: naming the holder's process, machine and start.
        """
        try:
            lock = self.lock.open(encoding="utf-8")
        except OSError:
            return
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise self._busy(lock) from error

    def _busy(self, lock: IO[str]) -> BusyError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown process"
        lock.close()
        return BusyError(
            f"the run folder is in use by {holder}",
            where=str(self.path),
            fix="wait for it, or choose another out=DIR",
        )

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
        from loratune.runs.checkpoint import published_checkpoints

        names = [path.name for path in published_checkpoints(self.checkpoints)]
        return f"newest checkpoint {names[-1]}" if names else "no checkpoint yet"

    def write_recipe(self, config: RunConfig) -> None:
        """The resolved recipe, reloadable, without secrets."""
        import yaml

        values = recipe_record(config)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        files.write_text(self.recipe, text)

    def append(self, path: Path, record: dict[str, Any]) -> None:
        """Add one line to a jsonl file."""
        with files.storage_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=True) + "\n")

    def sync(self, path: Path) -> None:
        """Flush what was appended to a file, if there is one."""
        if path.exists():
            with files.storage_errors(path):
                files.sync_file(path)

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

    def link_latest(self, name: str) -> None:
        """``outputs/NAME/latest`` points to this run; only a convenience, so never an error."""
        if self.path.parent != Path("outputs") / name:
            return
        link = self.path.parent / "latest"
        temporary = link.with_name(f"{files.TEMPORARY_PREFIX}latest-{os.getpid()}")
        try:
            if link.exists() and not link.is_symlink():
                return
            temporary.symlink_to(self.path.name)
            os.replace(temporary, link)
        except OSError:
            temporary.unlink(missing_ok=True)


_NOT_RECORDED = ("out", "resume", "allow_drift")


def recipe_record(config: RunConfig) -> dict[str, Any]:
    """The recipe as runs and checkpoints record it: without secrets, and without what was said
    for one start only, so that a run that was killed or moved has the same bytes as one that
    was not.
    """
    values = run_fields(to_plain(config))
    kept: dict[str, Any] = redact({k: v for k, v in values.items() if k not in _NOT_RECORDED})
    return kept


def fresh_folder(parent: Path) -> Path:
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


def _refuse_unwritable(path: Path) -> None:
    """Ask the nearest folder that exists whether it can be written."""
    folder = next(p for p in (path, *path.parents) if p.exists())
    if not folder.is_dir():
        raise StorageError(f"'{folder}' is not a folder", where=str(path), fix="choose out=DIR")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"'{folder}' is not writable", where=str(path), fix="choose out=DIR")


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise SecurityError(
            "the run folder is a symbolic link", where=str(path), fix="name the folder itself"
        )
    if path.exists() and not path.is_dir():
        raise StorageError("the run folder's name is a file", where=str(path), fix="choose out=DIR")


def write_summary(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``summary.json`` with the sha256 and size of every record beside it.

    Raises:
        StorageError: if the disk refuses.
    """
    described = {
        path.name: {"sha256": files.sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.is_symlink() and path.name not in _NOT_SEALED
    }
    files.write_sealed_json(folder / SUMMARY, {**record, "files": described})
