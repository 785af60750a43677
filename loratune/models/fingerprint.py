"""Fingerprints that bind an adapter to the base, tokenizer and projections it was trained with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.models.weights import (
    TensorEntry,
    check_stored,
    hash_tensors,
    read_all,
    tensor_entries,
)

if TYPE_CHECKING:
    from torch import Tensor


def base_fingerprint(folder: Path) -> str:
    """Fingerprint of a model folder's weights: names, dtypes, shapes and every byte.

    Independent of how the tensors are spread over files.

    Raises:
        ModelError: if a weight is NaN or infinite, or a file is broken.
    """
    return combine_hashes(tensor_entries(folder), checked_hashes(folder))


def checked_hashes(folder: Path, part: int = 0, parts: int = 1) -> dict[str, str]:
    """Hex sha256 of a model folder's tensors, whose numbers are checked: of one part of them.

    Args:
        folder: the model's.
        part: which of the parts, from 0; all have about as many bytes.
        parts: how many there are.

    Raises:
        ModelError: if a weight is NaN or infinite, or a file is broken.
    """
    entries = tensor_entries(folder)
    total = sum(entry.size for entry in entries.values())
    before = accumulate((entry.size for entry in entries.values()), initial=0)
    own = {
        name: entry
        for (name, entry), start in zip(entries.items(), before, strict=False)
        if min(start * parts // max(total, 1), parts - 1) == part
    }
    return hash_tensors(own, check_stored)


def combine_hashes(entries: Mapping[str, TensorEntry], hashes: Mapping[str, str]) -> str:
    """One fingerprint from the hashes of all tensors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(entries):
        entry = entries[name]
        digest.update(f"{name} {entry.dtype} {list(entry.shape)} {hashes[name]}\n".encode())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Fingerprint of what a tokenizer does: vocabulary, merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    facts = {
        "vocabulary": vocabulary,
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Fingerprint of tensors in memory, by name, dtype, shape and bytes."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hashes_in_memory(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Hex sha256 of every tensor's bytes, as a file that holds them would give."""
    import torch

    hashes = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        hashes[name] = hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
    return hashes


def file_fingerprint(path: Path) -> str:
    """``tensors_fingerprint`` of a safetensors file's tensors, without loading it.

    Raises:
        ModelError: if it is not a safetensors file.
    """
    return tensors_fingerprint(read_all(path))
