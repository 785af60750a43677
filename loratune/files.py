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
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from loratune.errors import BusyError, SecurityError, StorageError

TEMPORARY_PREFIX = ".tmp-"
ASSETS = Path(__file__).parent / "assets"
"""The embedded model, its rows and the published counts."""
BUILTIN = "builtin:"
"""What a path begins with that means something embedded."""
FORMAT = 1
"""Of every record that says one: manifests, certificates, ``loratune.json``."""
_CHUNK = 1 << 22
_FILE_MODE, _FOLDER_MODE = 0o644, 0o755
"""At most: whatever the umask, nobody else may write what loratune wrote."""


class NewerFormatError(ValueError):
    """A record in a format that a later version of loratune writes."""


def restrict_modes() -> None:
    """From now on, files of this process and its children are not group- or other-writable."""
    os.umask(os.umask(0o077) | 0o022)


def temporary_name(path: Path) -> Path:
    """An unguessable name beside ``path``, so that nobody can lie in wait there with a link."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(8)}")


def open_own(path: Path, flags: int, mode: str = "r+") -> IO[Any]:
    """Open a file for writing with extra ``os.open`` flags; a link in its place is an error.

    Raises:
        OSError: if it is a link, or cannot be opened.
    """
    descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE_MODE)
    return os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8")


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


def check_outside(out: Path, *sources: Path) -> None:
    """Check that nothing is written among the files of a model or an adapter that is read.

    Args:
        out: a file or folder to be written, there already or not; links are followed.
        sources: folders that stay as they are.

    Raises:
        BusyError: if ``out`` is one of them, or lies in one.
    """
    for source in sources:
        if out.expanduser().resolve().is_relative_to(source.expanduser().resolve()):
            raise BusyError(
                f"the output lies inside '{source}', which is read and stays as it is",
                where=str(out),
                fix="choose another out=DIR",
            )


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
    temporary = temporary_name(path)
    with storage_errors(path):
        file = open_own(temporary, os.O_WRONLY | os.O_EXCL, "wb")  # what lies there stays
        try:
            with file:
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
        NewerFormatError: if a newer loratune wrote it; it may be sealed in another way.
        ValueError: if a byte differs from what was written.
    """
    content = path.read_bytes()
    value = json.loads(content.decode("utf-8"))
    number = value.get("format") if isinstance(value, dict) else None
    if isinstance(number, int) and number > FORMAT:
        raise NewerFormatError(
            f"written by a newer loratune (format {number}; this one reads up to {FORMAT})"
        )
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


@contextlib.contextmanager
def published_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Build a folder under a temporary name and rename it to ``target`` when the block succeeds.

    Every file written in the block is flushed before the rename; on any failure the temporary
    folder is removed and ``target`` never appears.

    Args:
        target: the folder to appear.
        replace: let it take the place of an earlier one.

    Raises:
        BusyError: if ``target`` is occupied and not to be replaced, or another process was faster.
        SecurityError: if it is a link.
        StorageError: if the disk refuses.
    """
    with storage_errors(target):
        if target.parent.is_dir():
            _remove_abandoned(target, restore=replace)
        occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
        if target.is_symlink():
            raise SecurityError(
                "the output is a symbolic link", where=str(target), fix="name the folder itself"
            )
        if occupied and not (replace and target.is_dir()):
            raise BusyError("the output already exists", where=str(target), fix="choose out=DIR")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(target)
        temporary.mkdir(_FOLDER_MODE)
        with _held(temporary):
            try:
                yield temporary
                _publish(temporary, target, occupied=occupied)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` for what its writing needs; it is gone at the end.

    What a killed writer left of it, the next one removes.

    Raises:
        StorageError: if the disk refuses.
    """
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target, restore=False)
        temporary = temporary_name(target)
        temporary.mkdir(_FOLDER_MODE)
        with _held(temporary):
            try:
                yield temporary
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, target: Path, *, occupied: bool) -> None:
    for path in sorted(temporary.rglob("*")):
        path.chmod(path.stat().st_mode & _FOLDER_MODE)
        if path.is_file():
            sync_file(path)
    sync_folder(temporary)
    try:
        if occupied:
            with contextlib.suppress(FileNotFoundError):  # another process has set it aside
                os.rename(target, _aside(target))
        os.rename(temporary, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        cause = "another process wrote the output in the meantime"
        raise BusyError(cause, where=str(target), fix="choose out=DIR") from error
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
    if restore and aside.is_dir() and not aside.is_symlink() and not target.exists():
        os.rename(aside, target)  # killed between setting it aside and publishing the new one
    shutil.rmtree(aside, ignore_errors=True)
    pattern = re.compile(re.escape(f"{TEMPORARY_PREFIX}{target.name}-") + _UNIQUE)
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


_UNIQUE = r"([0-9a-f]{16}|\d+)"
"""How temporary names end; versions before 1 wrote the process's number."""
_LEFTOVER = re.compile(re.escape(TEMPORARY_PREFIX) + rf"(old-.+|.+-{_UNIQUE})")


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
