"""Where a base model's files are: a folder, the embedded demo, or the hub's local copy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loratune.errors import ModelError, SecurityError, did_you_mean

BUILTIN = "builtin:"
_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]


def assets() -> Path:
    """The files embedded in the package."""
    return Path(__file__).parent / "assets"


def is_hub_id(path: str) -> bool:
    """Whether a model path can only be a hub id: ``owner/name`` or ``name``, and no such folder."""
    parts = path.split("/")
    return (
        not path.startswith((BUILTIN, ".", "/", "~"))
        and len(parts) <= 2
        and all(parts)
        and not Path(path).exists()
    )


def model_folder(path: str, revision: str | None = None) -> Path:
    """The local folder of a base model; a hub id is fetched into the hub's own cache.

    Only safetensors, JSON and tokenizer files are fetched: never code, never pickles.

    Raises:
        ModelError: if it is not there and cannot be fetched.
    """
    if path.startswith(BUILTIN):
        folder = assets() / path.removeprefix(BUILTIN)
        if not folder.is_dir() or Path(path.removeprefix(BUILTIN)).name != folder.name:
            raise ModelError(f"no embedded model '{path}'", where="model.path", fix="builtin:demo-opt")
        return folder
    if not is_hub_id(path):
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ModelError("the model folder does not exist", where=str(folder), fix=_close(folder))
        return folder
    return _fetch(path, revision)


def _close(folder: Path) -> str:
    siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
    return did_you_mean(folder.name, siblings) or "set model.path to a folder or a hub id"


def _fetch(path: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    offline = bool(os.environ.get("HF_HUB_OFFLINE"))
    try:
        folder = snapshot_download(path, revision=revision, allow_patterns=_FILES)
    except Exception as error:  # the hub client raises a dozen kinds, all meaning "not here"
        reason = "the hub is switched off (HF_HUB_OFFLINE)" if offline else type(error).__name__
        raise ModelError(
            f"cannot get '{path}' from the hub: {reason}",
            where="model.path",
            fix="set model.path to a local folder",
        ) from None
    return Path(folder)


def read_model_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        ModelError: if it is missing or broken.
        SecurityError: if it asks for code of its own.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise ModelError("config.json is missing", where=str(folder), fix="set model.path") from error
    except (OSError, ValueError) as error:
        raise ModelError("config.json is unreadable", where=str(path)) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError("config.json names no model_type", where=str(path))
    if config.get("auto_map"):
        raise SecurityError(
            "the model asks to run code of its own (auto_map)",
            where=str(path),
            fix="use a model whose architecture transformers knows",
        )
    return config
