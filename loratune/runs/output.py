"""Where a command may write: never among the files of a model or an adapter."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from loratune import files
from loratune.config.schema import RunConfig
from loratune.errors import BusyError, SecurityError, StorageError

OUTPUTS = Path("outputs")
"""Where runs go that no ``out`` names a folder for: ``outputs/RECIPE/TIME-HASH``."""
RECIPE = "recipe.yaml"
"""In every run's folder."""
TASK = "task.json"
"""In every comparison's folder."""
_MODEL = "a model or an adapter"
_PUBLISHED = {
    "config.json": _MODEL,
    "adapter_config.json": _MODEL,
    "model.safetensors": _MODEL,
    "manifest.json": "a checkpoint",
    RECIPE: "a run",
    TASK: "a comparison",
}


def check_output(config: RunConfig) -> None:
    """Check the folder that ``out`` names, or the one that is taken without it.

    Raises:
        BusyError: if it lies inside the base model or the adapter that is read.
        SecurityError: if it is a link.
        StorageError: if it is a file.
    """
    path = OUTPUTS / config.name if config.out is None else Path(config.out)
    if config.out is not None:
        _check_is_folder(path)
    check_outside_sources(path, config)


def check_outside_sources(path: Path, config: RunConfig) -> None:
    """Check that a file or folder does not lie inside the base model or the adapter that is read.

    Raises:
        BusyError: if it does.
    """
    files.check_outside(path, *_sources(config))


def _sources(config: RunConfig) -> list[Path]:
    """The folders that a run reads: its base model's, an adapter's that it continues."""
    base = str(config.model.path)
    own = [files.ASSETS] if base.startswith(files.BUILTIN) else []
    paths = (Path(path).expanduser() for path in (base, config.adapter_path) if path)
    return [*own, *(path for path in paths if path.is_dir())]


def check_unoccupied(folder: Path, *, besides: Sequence[str] = ()) -> None:
    """Check that nothing is put among the files of a model, an adapter, a run or the like.

    Args:
        folder: where something is to be written.
        besides: names of files that may lie there.

    Raises:
        BusyError: if the folder holds one, whoever's it is.
    """
    for name, what in _PUBLISHED.items():
        if name not in besides and (folder / name).exists():
            raise BusyError(
                f"the folder holds {what} ({name})",
                where=str(folder),
                fix="choose another out=DIR",
            )


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


def check_writable(path: Path) -> None:
    """Ask the nearest folder that exists whether it can be written."""
    folder = next(p for p in (path, *path.parents) if p.exists())
    if not folder.is_dir():
        raise StorageError(f"'{folder}' is not a folder", where=str(path), fix="choose out=DIR")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"'{folder}' is not writable", where=str(path), fix="choose out=DIR")


def _check_is_folder(path: Path) -> None:
    if path.is_symlink():
        raise SecurityError(
            "the run folder is a symbolic link", where=str(path), fix="name the folder itself"
        )
    if path.exists() and not path.is_dir():
        raise StorageError("the run folder's name is a file", where=str(path), fix="choose out=DIR")
