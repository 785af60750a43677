"""What a merged model's folder holds besides its weights: index, configuration, tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loratune import files
from loratune.config.schema import Dtype
from loratune.models.build import GENERATION_CONFIG
from loratune.models.load import load_tokenizer
from loratune.models.untrusted import check_tokenizer
from loratune.models.weights import INDEX, SINGLE, TensorEntry
from loratune.runs.run_dir import MERGE_REPORT

_COPIED = ("*.json", "*.model", "*.txt", "*.jinja")
_NOT_COPIED = (INDEX, MERGE_REPORT, "config.json", "adapter_config.json", "loratune.json")


def complete_folder(
    base_folder: Path,
    target: Path,
    entries: Mapping[str, TensorEntry],
    dtype: Dtype,
    *,
    unties: bool,
    vocabulary: int | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write everything beside the weights, so that ``target`` loads like the base did.

    Args:
        base_folder: the base model's files.
        target: the folder with the merged weights.
        entries: the merged tensors.
        dtype: of the merged weights where it was changed, else auto.
        unties: whether head and input embedding had to part.
        vocabulary: rows of the embeddings, where an adapter resized them.
        tokenizer: a folder whose tokenizer takes the place of the base's.
    """
    _write_index(target, entries)
    _write_config(base_folder, target, dtype, unties=unties, vocabulary=vocabulary)
    copy_side_files(base_folder, target)
    if tokenizer is not None:
        check_tokenizer(tokenizer)
        copy_side_files(tokenizer, target)


def _write_index(target: Path, entries: Mapping[str, TensorEntry]) -> None:
    weight_map = {name: entry.file.name for name, entry in entries.items()}
    if set(weight_map.values()) == {SINGLE}:
        return
    size = sum(entry.size for entry in entries.values())
    files.write_json(target / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _write_config(
    base_folder: Path, target: Path, dtype: Dtype, *, unties: bool, vocabulary: int | None
) -> None:
    config = files.read_json(base_folder / "config.json")
    if vocabulary is not None:
        owner = config if "vocab_size" in config else config.get("text_config", config)
        owner["vocab_size"] = vocabulary
    if unties:
        config["tie_word_embeddings"] = False
    if dtype is not Dtype.auto:
        config["dtype"] = str(dtype)
        config.pop("torch_dtype", None)
    files.write_json(target / "config.json", config)


def write_ends(folder: Path, ends: Sequence[int]) -> None:
    """Let a merged model's ``generation_config.json`` name every token that ends an answer.

    Its other settings stay; where there is no such file, start and padding are ``config.json``'s,
    as transformers takes them then.

    Raises:
        OSError, ValueError: if the base's file is not JSON.
    """
    path = folder / GENERATION_CONFIG
    if path.is_file():
        settings = files.read_json(path)
    else:
        config = files.read_json(folder / "config.json")
        keys = ("bos_token_id", "pad_token_id")
        settings = {key: config[key] for key in keys if config.get(key) is not None}
    before = settings.get("eos_token_id")
    if sorted(ends) != sorted(before if isinstance(before, list) else [before]):
        files.write_json(path, {**settings, "eos_token_id": sorted(ends)})


def replaced_tokenizer(base_folder: Path, own: Path) -> Any:
    """The tokenizer that a merged model has whose adapter brings its own.

    Raises:
        LoratuneError: if it is broken, or asks for more than its files.
    """
    check_tokenizer(own)
    with TemporaryDirectory() as target:
        shutil.copyfile(base_folder / "config.json", Path(target, "config.json"))
        copy_side_files(base_folder, Path(target))
        copy_side_files(own, Path(target))
        return load_tokenizer(Path(target))


def copy_side_files(base_folder: Path, target: Path) -> None:
    """Tokenizer, generation settings and the like, as they are."""
    for pattern in _COPIED:
        for path in sorted(base_folder.glob(pattern)):
            if path.name not in _NOT_COPIED and path.is_file():
                shutil.copyfile(path, target / path.name)
