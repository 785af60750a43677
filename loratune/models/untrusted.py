"""The JSON files of a model folder, checked before transformers reads them: data, never code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loratune.errors import ModelError, SecurityError, raise_together
from loratune.models.weights import inside, leads_out

RESTORE = "restore the file that belongs to the weights"
_PLAIN = "use a model whose architecture transformers knows, and remove the key"
_LOADED = ("*.json", "*.model", "*.txt", "*.jinja", "*/*.jinja")
_ADAPTER = "adapter_config.json"
_TOKENIZER_SETTINGS = (
    "tokenizer_config.json", "special_tokens_map.json", "processor_config.json",
)  # fmt: skip


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        ModelError: if it is missing or broken.
        SecurityError: if it is a link to somewhere else.
    """
    path = inside(folder, name)
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        cause, fix = _instead_of_a_model(folder)
        raise ModelError(f"{name} is missing{cause}", where=str(folder), fix=fix) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{name} is unreadable", where=str(path), fix=RESTORE) from error
    if not isinstance(value, dict):
        raise ModelError(f"{name} is not a JSON object", where=str(path), fix=RESTORE)
    return value


def _instead_of_a_model(folder: Path) -> tuple[str, str]:
    """What a folder without config.json is, and what to name instead."""
    if (folder / _ADAPTER).exists():
        base = _base_of_adapter(folder)
        named = f" ({base!r}, says the adapter)" if base else ""
        return (
            ": this is an adapter, not a base model",
            f"set model.path to its base model{named}; the adapter itself is adapter_path",
        )
    if (folder / "recipe.yaml").exists():
        return (
            ": this is a run folder, not a base model",
            "set run=DIR, or model.path to its merged model (DIR/merged)",
        )
    if (folder / "manifest.json").exists():
        return ": this is a checkpoint, not a base model", "set resume=DIR to continue from it"
    return "", "set model.path to a folder written by save_pretrained"


def _base_of_adapter(folder: Path) -> str:
    try:
        config = json.loads((folder / _ADAPTER).read_bytes().decode("utf-8"))
        return str(config.get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Check what ``config.json`` asks for, before transformers reads it.

    Raises:
        ModelError: if an adapter lies in the same folder, which transformers would put in.
        SecurityError: for code of its own, and for files outside the folder.
    """
    if (folder / _ADAPTER).exists():
        raise ModelError(
            f"the folder holds a base model and an adapter ({_ADAPTER}): which is meant?",
            where=str(folder),
            fix=f"move {_ADAPTER} and adapter_model.safetensors into a folder of their own, "
            "and name that with adapter_path",
        )
    _check_links(folder)
    _check_keys(folder / "config.json", config, _config_reason)


def check_tokenizer(folder: Path) -> None:
    """Check what a tokenizer's settings ask for, before transformers reads them.

    Raises:
        ModelError: if they are unreadable.
        SecurityError: for code of its own, and for files outside the folder.
    """
    _check_links(folder)
    for name in _TOKENIZER_SETTINGS:
        path = folder / name
        if path.exists() or path.is_symlink():
            _check_keys(path, read_object(folder, name), _tokenizer_reason)


def _check_links(folder: Path) -> None:
    """No file that transformers reads from a model folder may be a link to somewhere else."""
    for pattern in _LOADED:
        for path in sorted(folder.glob(pattern)):
            if leads_out(folder, path):
                raise SecurityError(
                    "a link leads out of the folder", where=str(path), fix="copy the file itself"
                )


def _check_keys(
    path: Path, values: Mapping[str, Any], reason_against: Callable[[str, Any], str]
) -> None:
    raise_together(
        SecurityError(f"{path.name} {reason}", where=f"{path}: {key}", fix=_PLAIN)
        for key, value in _all_keys(values)
        if (reason := reason_against(key.rsplit(".", 1)[-1], value))
    )


def _all_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every key, those of nested objects after their own."""
    for key, value in values.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _all_keys(value, f"{prefix}{key}.")


def _config_reason(key: str, value: Any) -> str:
    """Why a key of config.json is more than numbers, or an empty string.

    ``auto_map`` names Python files; the private attention key, and an attention "kernel" with an
    owner, fetch code from the hub; ``transformers_weights`` replaces the weights we fingerprint.
    """
    if key == "auto_map" and value:
        return "asks to run code of its own"
    if key == "_attn_implementation_internal":
        return "sets a private key that loads code"
    if "attn_implementation" in key and "/" in json.dumps(value):
        return "names an attention kernel to fetch"
    if key in ("transformers_weights", "custom_generate", "custom_pipelines") and value:
        return "names other files to load"
    return ""


def _tokenizer_reason(key: str, value: Any) -> str:
    if key == "auto_map" and value:
        return "asks to run code of its own"
    if key.endswith("_file") and isinstance(value, str) and value != Path(value).name:
        return f"names a file elsewhere ({value!r})"
    return ""
