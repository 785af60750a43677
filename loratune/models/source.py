"""Where a base model's files are: a folder, the embedded demo, or the hub's local copy."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loratune.errors import ConfigError, ModelError, SecurityError, did_you_mean, raise_together
from loratune.files import ASSETS, BUILTIN
from loratune.models.weights import inside, leads_out

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
    if path.startswith(BUILTIN):
        folder = ASSETS / path.removeprefix(BUILTIN)
        if not folder.is_dir() or Path(path.removeprefix(BUILTIN)).name != folder.name:
            raise ModelError(
                f"no embedded model '{path}'", where="model.path", fix="builtin:demo-opt"
            )
        return folder
    if not is_hub_id(path):
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ModelError(
                "the model folder does not exist", where=str(folder), fix=_close(folder)
            )
        return folder
    return _fetch(path, revision, _FILES if weights else _FILES[1:])


def _close(folder: Path) -> str:
    siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
    return did_you_mean(folder.name, siblings) or "set model.path to a folder or a hub id"


def _fetch(path: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    offline = bool(os.environ.get("HF_HUB_OFFLINE"))
    try:
        folder = snapshot_download(path, revision=revision, allow_patterns=patterns)
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
        SecurityError: if it asks for code of its own, or for files elsewhere.
    """
    path = folder / "config.json"
    config = _read_object(path, folder)
    if "model_type" not in config:
        raise ModelError("config.json names no model_type", where=str(path), fix=_RESTORE)
    _refuse_links(folder)
    raise_together(
        SecurityError(f"config.json {reason}", where=f"{path}: {key}", fix=_PLAIN)
        for key, value in _leaves(config)
        if (reason := _reason_against(key, value))
    )
    return config


_RESTORE = "restore the file that belongs to the weights"
_PLAIN = "use a model whose architecture transformers knows, and remove the key"


def _read_object(path: Path, folder: Path) -> dict[str, Any]:
    """A JSON object of a model folder."""
    inside(folder, path.name)
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        cause = f"{path.name} is missing"
        raise ModelError(
            cause, where=str(folder), fix="set model.path to a model folder"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is unreadable", where=str(path), fix=_RESTORE) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is no JSON object", where=str(path), fix=_RESTORE)
    return value


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every key, outer ones first."""
    for key, item in value.items():
        yield f"{prefix}{key}", item
        if isinstance(item, dict):
            yield from _leaves(item, f"{prefix}{key}.")


def _reason_against(key: str, value: Any) -> str:
    """Why a key of config.json is more than numbers, or an empty string.

    ``auto_map`` names Python files; the private attention key, and an attention "kernel" with an
    owner, fetch code from the hub; ``transformers_weights`` replaces the weights we fingerprint.
    """
    name = key.rsplit(".", 1)[-1]
    if name == "auto_map" and value:
        return "asks to run code of its own"
    if name == "_attn_implementation_internal":
        return "sets a private key that loads code"
    if "attn_implementation" in name and "/" in json.dumps(value):
        return "names an attention kernel to fetch"
    if name in ("transformers_weights", "custom_generate", "custom_pipelines") and value:
        return "names other files to load"
    return ""


_LOADED = ("*.json", "*.model", "*.txt", "*.jinja", "*/*.jinja")


def _refuse_links(folder: Path) -> None:
    """No file that transformers reads from a model folder may be a link to somewhere else."""
    for pattern in _LOADED:
        for path in sorted(folder.glob(pattern)):
            if leads_out(folder, path):
                raise SecurityError(
                    "a link leads out of the folder", where=str(path), fix="copy the file itself"
                )


def refuse_tokenizer_code(folder: Path) -> None:
    """Check what a tokenizer's settings ask for, before transformers reads them.

    Raises:
        ModelError: if they are unreadable.
        SecurityError: for code of its own, and for files outside the folder.
    """
    _refuse_links(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "processor_config.json"):
        path = folder / name
        if not path.exists() and not path.is_symlink():
            continue
        settings = _read_object(path, folder)
        raise_together(
            SecurityError(f"{name} {reason}", where=f"{path}: {key}", fix=_PLAIN)
            for key, value in _leaves(settings)
            if (reason := _tokenizer_reason(key, value))
        )


def _tokenizer_reason(key: str, value: Any) -> str:
    name = key.rsplit(".", 1)[-1]
    if name == "auto_map" and value:
        return "asks to run code of its own"
    if name.endswith("_file") and isinstance(value, str) and value != Path(value).name:
        return f"names a file elsewhere ({value!r})"
    return ""
