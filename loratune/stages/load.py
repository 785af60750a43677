"""Load the base model and its tokenizer from local files, strictly."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loratune.config.schema import ModelConfig, Precision
from loratune.models.devices import resolve_device, resolve_dtype
from loratune.models.dtypes import torch_dtype
from loratune.models.fingerprint import base_fingerprint, tokenizer_fingerprint
from loratune.models.load import load_model, load_tokenizer
from loratune.models.quantized.format import Quantization, find_quantization, identity
from loratune.models.source import model_folder, read_model_config
from loratune.models.vocabulary import grow, tokenizer_and_rows
from loratune.models.weights import stored_dtype, tensor_entries


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
    """

    model: nn.Module
    tokenizer: Any
    folder: Path
    name: str
    _fingerprint: Future[str]
    added_tokens: tuple[str, ...] = ()
    quantization: Quantization | None = None

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def weights_fingerprint(self) -> str:
        """Fingerprint of the weights on disk (computed beside the loading)."""
        return self._fingerprint.result()

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
    config: ModelConfig, precision: Precision = Precision.auto, tokenizer: Any = None
) -> BaseModel:
    """Load a base model.

    Args:
        config: which model, dtype, device and attention.
        precision: of the training arithmetic; decides the dtype where the model's says auto.
        tokenizer: the model's own with the added tokens, if it was read before.

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
    pool = ThreadPoolExecutor(max_workers=1)
    fingerprint = pool.submit(base_fingerprint, folder)
    pool.shutdown(wait=False)
    if quantization is not None:
        wait([fingerprint])  # what it reads would add to the peak of memory
    model: Any = load_model(folder, dtype, device, str(config.attention), quantization)
    tokenizer = tokenizer or tokenizer_and_rows(folder, config.add_tokens)[0]
    if config.add_tokens and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        grow(model, len(tokenizer))
    added = tuple(config.add_tokens)
    return BaseModel(model, tokenizer, folder, config.path, fingerprint, added, quantization)
