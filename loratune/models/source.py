"""Where a base model's files are: a folder, the embedded demo, or the hub's local copy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from loratune.errors import ConfigError, ModelError, did_you_mean
from loratune.files import ASSETS, BUILTIN
from loratune.models.untrusted import RESTORE, check_config, read_object

_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]


def is_hub_id(path: str) -> bool:
    """Whether a model path can only be a hub id: ``owner/name`` or ``name``, and no such folder."""
    parts = path.split("/")
    return (
        not path.startswith((BUILTIN, ".", "/", "~"))
        and len(parts) <= 2
        and all(parts)
        and not Path(path).exists()
    )


def recorded_path(path: str) -> str:
    """A model path as a run records it: a local folder from the root, so that it is found again.

    What is found here now is a folder for good: it is never taken for a hub id elsewhere.
    """
    if path.startswith(BUILTIN) or is_hub_id(path):
        return path
    return os.path.abspath(Path(path).expanduser())


def local_folder(path: str) -> Path | None:
    """The folder that a model path names: an embedded model or a local one; None for a hub id.

    Raises:
        ModelError: if the folder does not exist.
    """
    if is_hub_id(path):
        return None
    name = path.removeprefix(BUILTIN)
    if path.startswith(BUILTIN):
        folder = ASSETS / name
        if not folder.is_dir() or Path(name).name != folder.name:
            cause = f"there is no embedded model '{path}'"
            raise ModelError(cause, where="model.path", fix="builtin:demo-opt")
        return folder
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise _no_folder(folder)
    return folder


def _no_folder(folder: Path) -> ModelError:
    if folder.is_file():
        fix = f"set model.path to its folder, {folder.parent}"
        return ModelError("this is a file, not a model folder", where=str(folder), fix=fix)
    siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
    fix = did_you_mean(folder.name, siblings) or "set model.path to a folder or a hub id"
    return ModelError("no such folder", where=str(folder), fix=fix)


def model_folder(path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a base model; a hub id is fetched into the hub's own cache.

    Only safetensors, JSON and tokenizer files are fetched: never code, never pickles; without
    ``weights`` the safetensors stay where they are too.

    Raises:
        ModelError: if it is not there and cannot be fetched.
        ConfigError: if a revision of a local folder is asked for.
    """
    if revision is not None and not is_hub_id(path):
        raise ConfigError(
            "model.revision has no effect on a local model",
            where=f"model.revision={revision}",
            fix="remove it, or set model.path to a hub id",
        )
    return local_folder(path) or _fetch(path, revision, _FILES if weights else _FILES[1:])


def _fetch(path: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    offline = bool(os.environ.get("HF_HUB_OFFLINE"))
    try:
        folder = snapshot_download(path, revision=revision, allow_patterns=patterns)
    except Exception as error:  # the hub client raises a dozen kinds, all meaning "not here"
        reason = "the hub is switched off (HF_HUB_OFFLINE)" if offline else type(error).__name__
        raise ModelError(
            f"there is no folder '{path}' here, and the hub did not give it: {reason}",
            where="model.path",
            fix="set model.path to a local folder",
        ) from None
    return Path(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder, as it is: enough to count, not to load the model.

    Raises:
        ModelError: if the folder or the file is missing or broken.
        SecurityError: if the file is a link to somewhere else.
    """
    if not folder.is_dir():
        raise _no_folder(folder)
    return read_object(folder, "config.json")


def read_model_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder that is about to be loaded.

    Raises:
        ModelError: if it is missing or broken.
        SecurityError: if it asks for code of its own, or for files elsewhere.
    """
    config = read_config(folder)
    if "model_type" not in config:
        where = str(folder / "config.json")
        raise ModelError("config.json names no model_type", where=where, fix=RESTORE)
    check_config(folder, config)
    return config
