"""The base model that a folder is compared with, measured once however often it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from loratune.models.fingerprint import combine_hashes, tokenizer_fingerprint
from loratune.models.load import load_tokenizer
from loratune.models.tensors import check_stored
from loratune.models.weights import TensorEntry, hash_tensors, tensor_entries


@dataclass
class Base:
    """A base model's folder; every property raises ``LoratuneError`` if it is unusable.

    Attributes:
        folder: its files.
    """

    folder: Path

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """Where every tensor lies."""
        return tensor_entries(self.folder)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Hex sha256 of every tensor."""
        return hash_tensors(self.entries, check_stored)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the weights."""
        return combine_hashes(self.entries, self.hashes)

    @cached_property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer."""
        return tokenizer_fingerprint(load_tokenizer(self.folder))
