"""Load the base model and its tokenizer from local files, strictly."""

from __future__ import annotations

import socket
from collections import ChainMap
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loratune.config.schema import ModelConfig, Precision
from loratune.errors import ConfigError
from loratune.models.devices import resolve_device, resolve_dtype
from loratune.models.dtypes import torch_dtype
from loratune.models.fingerprint import checked_hashes, combine_hashes, tokenizer_fingerprint
from loratune.models.load import load_model, load_tokenizer, load_without_parameters
from loratune.models.quantized.format import Quantization, find_quantization, identity
from loratune.models.source import model_folder, read_model_config
from loratune.models.unread import UnreadParameters
from loratune.models.vocabulary import grow, tokenizer_and_rows
from loratune.models.weights import stored_dtype, tensor_entries
from loratune.runs import processes


@dataclass
class BaseModel:
    """A loaded base model.

    Attributes:
        model: the transformers model, on its device, in eval mode.
        tokenizer: its tokenizer.
        folder: where its files lie.
        name: what the recipe called it.
        added_tokens: what the tokenizer has beyond the folder's own.
        quantization: how its linear layers are stored, where they are quantized.
        unread: where the parameters have no data yet, what gives them their values.
        sharers: ranks among which the hashing of the same files is shared out.
    """

    model: nn.Module
    tokenizer: Any
    folder: Path
    name: str
    _hashes: Future[dict[str, str]]
    added_tokens: tuple[str, ...] = ()
    quantization: Quantization | None = None
    unread: UnreadParameters | None = None
    sharers: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return next(self.model.parameters()).dtype

    @cached_property
    def weights_fingerprint(self) -> str:
        """Fingerprint of the weights on disk, hashed beside the loading.

        Collective where several processes shared the tensors out.
        """
        hashes: Mapping[str, str] = self._hashes.result()
        if self.sharers:
            gathered = processes.gather(hashes)
            hashes = ChainMap(*(gathered[rank] for rank in self.sharers))
        return combine_hashes(tensor_entries(self.folder), hashes)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the weights on disk and of how they are quantized."""
        return identity(self.weights_fingerprint, self.quantization)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Fingerprint of the base's own tokenizer, without tokens that the recipe adds."""
        own = load_tokenizer(self.folder) if self.added_tokens else self.tokenizer
        return tokenizer_fingerprint(own)

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        return int(embedding.weight.shape[0])


def load(
    config: ModelConfig,
    precision: Precision = Precision.auto,
    tokenizer: Any = None,
    *,
    shard: bool = False,
) -> BaseModel:
    """Load a base model.

    Args:
        config: which model, dtype, device and attention.
        precision: of the training arithmetic; decides the dtype where the model's says auto.
        tokenizer: the model's own with the added tokens, if it was read before.
        shard: leave the parameters unread: every process is to read its own part of them.

    Raises:
        LoratuneError: a missing folder, code in config.json, broken or missing weights, a
            shape that does not fit, an unusable dtype or device.
    """
    folder = model_folder(config.path, config.revision)
    read_model_config(folder)
    stored = torch_dtype(stored_dtype(tensor_entries(folder).values()))
    device = resolve_device(config.device)
    quantization = find_quantization(folder, config)
    dtype = resolve_dtype(config.dtype, precision, device, stored)
    if shard:
        require_shardable(quantization)
    sharers = _readers_of_same_files(folder) if shard else ()
    hashes = _hash_beside(folder, sharers)
    if quantization is not None:
        wait([hashes])  # what it reads would add to the peak of memory
    attention = str(config.attention)
    model: Any = (
        load_without_parameters(folder, dtype, attention)
        if shard
        else load_model(folder, dtype, device, attention, quantization)
    )
    tokenizer = tokenizer or tokenizer_and_rows(folder, config.add_tokens)[0]
    if config.add_tokens and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        grow(model, len(tokenizer))
    unread = UnreadParameters(model, folder, dtype, device) if shard else None
    added = tuple(config.add_tokens)
    stored_as = (added, quantization, unread, sharers)
    return BaseModel(model, tokenizer, folder, config.path, hashes, *stored_as)


def _readers_of_same_files(folder: Path) -> tuple[int, ...]:
    """The ranks on this machine that read the very files that this process reads.

    Not all ranks: one that was given another base would hide behind the others' hashes.
    """
    files = sorted({entry.file for entry in tensor_entries(folder).values()})
    found = [file.stat() for file in files]
    mine = (socket.gethostname(), [(one.st_dev, one.st_ino) for one in found])
    return tuple(rank for rank, other in enumerate(processes.gather(mine)) if other == mine)


def _hash_beside(folder: Path, sharers: tuple[int, ...]) -> Future[dict[str, str]]:
    """Hash a folder's tensors, or this process's part of them, in a thread of its own."""
    part, parts = (sharers.index(processes.rank()), len(sharers)) if sharers else (0, 1)
    pool = ThreadPoolExecutor(max_workers=1)
    hashes = pool.submit(checked_hashes, folder, part, parts)
    pool.shutdown(wait=False)
    return hashes


def require_shardable(quantization: Quantization | None) -> None:
    """Check that there are processes to share a base out to, and that it can be.

    Raises:
        ConfigError: for a single process, or a quantized base.
    """
    if processes.world_size() < 2:
        raise ConfigError(
            "launch.shard has no effect with one process",
            where="launch.shard",
            fix="launch.nproc=N",
        )
    if quantization is not None:
        raise ConfigError(
            f"a quantized base ({quantization.kind}) cannot be sharded",
            where="launch.shard",
            fix="launch.shard=false, or a base that is not quantized",
        )
