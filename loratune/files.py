"""Files that are there whole or not at all.

Everything loratune writes goes through here: to a temporary name in the same folder, flushed to
the disk, then renamed.  ``rename`` within one folder is atomic on POSIX file systems.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loratune.errors import StorageError

TEMPORARY_PREFIX = ".tmp-"
ASSETS = Path(__file__).parent / "assets"
"""The embedded model, its rows and the published counts."""
BUILTIN = "builtin:"
"""What a path begins with that means something embedded."""
_CHUNK = 1 << 22


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into one line that names the path and the free space.

    Raises:
        StorageError: for every ``OSError`` of the block.
    """
    try:
        yield
    except OSError as error:
        raise _storage_error(error, path) from error
    except Exception as error:  # safetensors reports a full disk as its own exception type
        message = str(error).lower()
        if type(error).__name__ != "SafetensorError" or not (
            "i/o error" in message or "io(" in message
        ):
            raise
        raise _storage_error(error, path) from error


def _storage_error(error: Exception, path: Path) -> StorageError:
    reason = getattr(error, "strerror", None) or str(error)
    number = getattr(error, "errno", None)
    fix = "choose a writable folder with out=DIR"
    full = any(text in reason for text in ("No space", "File too large", "quota"))
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or full:
        fix = f"free some disk space ({free_bytes(path):,} bytes left); nothing saved was lost"
    return StorageError(f"cannot write: {reason}", where=str(path), fix=fix)


def free_bytes(path: Path) -> int:
    """Bytes free on the file system that holds ``path`` (or its nearest existing parent)."""
    for folder in (path, *path.parents):
        if folder.is_dir():
            return shutil.disk_usage(folder).free
    return 0


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file's bytes to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all.

    Raises:
        StorageError: if the disk refuses; the temporary file is removed.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 ``text`` to ``path``, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def to_json(value: Any) -> str:
    """Stable, readable JSON: two spaces, a final newline, NaN refused."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON to ``path``, whole or not at all."""
    write_text(path, to_json(value))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not UTF-8 JSON.
    """
    return json.loads(path.read_bytes().decode("utf-8"))


def write_sealed_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object that carries its own sha256, so that any changed byte is seen."""
    write_json(path, {**value, "seal": _seal(value)})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Read what ``write_sealed_json`` wrote.

    Raises:
        OSError: if it cannot be read.
        ValueError: if a byte differs from what was written.
    """
    content = path.read_bytes()
    value = json.loads(content.decode("utf-8"))
    seal = value.pop("seal", None) if isinstance(value, dict) else None
    if seal is None or seal != _seal(value) or to_json({**value, "seal": seal}).encode() != content:
        raise ValueError("the seal is broken")
    assert isinstance(value, dict)
    return value


def _seal(value: Any) -> str:
    return hashlib.sha256(to_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_bytes(content: bytes | memoryview) -> str:
    """Hex sha256 of bytes in memory."""
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def published_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Build a folder under a temporary name and rename it to ``target`` when the block succeeds.

    Every file written in the block is flushed before the rename; on any failure the temporary
    folder is removed and ``target`` never appears.

    Args:
        target: the folder to appear.
        replace: let it take the place of an earlier one.

    Raises:
        StorageError: if the disk refuses, or ``target`` is occupied and not to be replaced.
    """
    with storage_errors(target):
        if target.parent.is_dir():
            _remove_abandoned(target, restore=replace)
        occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
        if target.is_symlink() or (occupied and not (replace and target.is_dir())):
            raise StorageError("the output already exists", where=str(target), fix="choose out=DIR")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}-{os.getpid()}")
        temporary.mkdir()
        with _held(temporary):
            try:
                yield temporary
                _publish(temporary, target, occupied=occupied)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise


def _publish(temporary: Path, target: Path, *, occupied: bool) -> None:
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            sync_file(path)
    sync_folder(temporary)
    if occupied:
        os.rename(target, _aside(target))
    os.rename(temporary, target)
    sync_folder(target.parent)
    shutil.rmtree(_aside(target), ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f"{TEMPORARY_PREFIX}old-{target.name}")


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Lock a folder while its writer lives; gives False if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _remove_abandoned(target: Path, *, restore: bool) -> None:
    """What killed writers of the same folder left beside it; a living writer's is left alone."""
    aside = _aside(target)
    if restore and aside.is_dir() and not target.exists():
        os.rename(aside, target)  # killed between setting it aside and publishing the new one
    shutil.rmtree(aside, ignore_errors=True)
    pattern = re.compile(re.escape(f"{TEMPORARY_PREFIX}{target.name}-") + r"\d+")
    for path in sorted(target.parent.iterdir()):
        if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with _held(path) as abandoned:
                if abandoned:
                    shutil.rmtree(path, ignore_errors=True)


def discard_folder(folder: Path) -> None:
    """Remove a folder that was published; readers see it whole or not at all."""
    if folder.is_dir() and not folder.is_symlink():
        with storage_errors(folder):
            shutil.rmtree(_aside(folder), ignore_errors=True)
            os.rename(folder, _aside(folder))
            shutil.rmtree(_aside(folder), ignore_errors=True)


_LEFTOVER = re.compile(re.escape(TEMPORARY_PREFIX) + r"(old-.+|.+-\d+)")


def leftovers(folder: Path) -> list[Path]:
    """What lies in a folder under the temporary names of this module."""
    temporary = sorted(folder.glob(f"{TEMPORARY_PREFIX}*"))
    return [path for path in temporary if _LEFTOVER.fullmatch(path.name)]


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left under temporary names.

    Only for a folder that this process holds: nobody else may be writing there.
    """
    for path in leftovers(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
