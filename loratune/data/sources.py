"""From ``data.path`` to files: one file, a folder, a pattern, or rows that ship with loratune."""

from __future__ import annotations

import difflib
import errno
import glob
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from loratune.config.mixture import SUFFIXES
from loratune.data.rows import listed
from loratune.errors import DataError, did_you_mean
from loratune.files import ASSETS, BUILTIN

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True, slots=True)
class DataFile:
    """A regular file of rows.

    Attributes:
        path: where it lies.
        label: how messages name it.
        suffix: ``.jsonl``, ``.csv``, ...: the kind, without ``.gz``.
    """

    path: Path
    label: str
    suffix: str


def find_files(path: str) -> list[DataFile]:
    """The files that a local ``data.path`` stands for, in a fixed order.

    Raises:
        DataError: nothing there, not a regular file, unknown kind, unreadable.
    """
    if path.startswith(BUILTIN):
        return [_builtin_file(path)]
    expanded = os.path.expanduser(path)
    if glob.has_magic(expanded) and not os.path.lexists(expanded):
        return _matching_files(path, expanded)
    mode = _mode(expanded)
    if stat.S_ISDIR(mode):
        return _folder_files(path, expanded)
    return [_regular_file(expanded, mode)]


def is_hub_id(path: str) -> bool:
    """Whether ``path`` can only be meant as ``owner/name`` or ``name`` on the hub."""
    if os.path.lexists(path) or path.startswith(BUILTIN) or not _HUB_ID.fullmatch(path):
        return False
    owner, _, name = path.rpartition("/")
    return kind(name) not in SUFFIXES and not (owner and os.path.isdir(owner))


def kind(name: str) -> str:
    """The suffix that says how to read a file: ``.jsonl`` for ``rows.jsonl.gz``."""
    return os.path.splitext(name.lower().removesuffix(".gz"))[1]


def _builtin_file(path: str) -> DataFile:
    folder = ASSETS / "demo-data"
    name = path.removeprefix(BUILTIN)
    names = sorted(file.stem for file in folder.glob("*.jsonl"))
    if name not in names:
        fix = did_you_mean(name, names) or f"built in are {listed(names)}"
        raise DataError(f"loratune has no built-in rows named '{name}'", where="data.path", fix=fix)
    return DataFile(folder / f"{name}.jsonl", path, ".jsonl")


def _matching_files(path: str, pattern: str) -> list[DataFile]:
    found = sorted(glob.glob(pattern, recursive=True))
    files = [_regular_file(name, mode) for name in found if not stat.S_ISDIR(mode := _mode(name))]
    if not files:
        raise DataError(f"the pattern '{path}' matches no file", where="data.path")
    return files


def _folder_files(path: str, folder: str) -> list[DataFile]:
    def refuse(error: OSError) -> None:
        raise _unreadable(error, str(error.filename))

    files = []
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if kind(name) in SUFFIXES and not name.startswith("."):
                whole = os.path.join(parent, name)
                files.append(_regular_file(whole, _mode(whole)))
    if not files:
        fix = f"put {', '.join(SUFFIXES)} files there"
        raise DataError(f"the folder '{path}' has no data files", where="data.path", fix=fix)
    return files


def _regular_file(path: str, mode: int) -> DataFile:
    if not stat.S_ISREG(mode):
        what = _KINDS.get(stat.S_IFMT(mode), "not a regular file")
        raise DataError(f"'{path}' is {what}", where="data.path", fix="use a regular file")
    suffix = kind(path)
    if suffix not in SUFFIXES:
        cause = f"'{path}' has an unknown kind '{suffix}'"
        raise DataError(cause, where="data.path", fix=f"use one of {', '.join(SUFFIXES)}")
    return DataFile(Path(path), path, suffix)


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError) as error:
        raise _unreadable(error, path) from error


def _missing(path: str) -> DataError:
    folder = os.path.dirname(path) or "."
    if os.path.islink(path):
        fix = f"its target '{os.readlink(path)}' is gone"
        return DataError(f"'{path}' is a broken symbolic link", where="data.path", fix=fix)
    if not os.path.isdir(folder):
        return DataError(f"no file '{path}': no folder '{folder}'", where="data.path")
    names = sorted(os.listdir(folder)) if os.access(folder, os.R_OK) else []
    close = difflib.get_close_matches(os.path.basename(path), names, n=3, cutoff=0.5)
    fix = f"did you mean {listed(close)}?" if close else f"'{folder}' has {listed(names[:8])}"
    return DataError(f"no file '{path}'", where="data.path", fix=fix if names else "")


def _unreadable(error: OSError | ValueError, path: str) -> DataError:
    reason = getattr(error, "strerror", None) or str(error)
    if getattr(error, "errno", None) == errno.ELOOP:
        reason = "its symbolic links form a loop"
    return DataError(f"cannot read '{path}': {reason}", where="data.path")


def read_error(error: OSError | EOFError, label: str) -> DataError:
    """A failed read as one line that names the file."""
    return _unreadable(error if isinstance(error, OSError) else OSError(str(error)), label)
