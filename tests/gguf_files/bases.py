"""Tiny bases with a tokenizer that llama.cpp has, and adapters on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.tiny_models import small_model
from transformers import AutoTokenizer

from loratune.adapter_files.peft_format import AdapterFolder, read_adapter, write_adapter
from loratune.adapters.registry import config_class
from loratune.config.schema import TargetsConfig
from loratune.models.load import load_model
from loratune.models.source import model_folder
from loratune.surgery import wrap_model

ROWS = 768
"""Embeddings: 28 more than the tokenizer has tokens."""
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_hidden_layers": 2}
"""Rows that are whole blocks of q8_0."""
TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 8},
    "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window": 8},
}
"""Type of base to its settings beside the sizes."""


def tiny_base(folder: Path, name: str, **settings: Any) -> Path:
    """A base of one of ``TYPES`` in a folder."""
    kind = name.partition(",")[0]
    head = {} if kind != "qwen2" else {"head_dim": None}
    model = small_model(kind, vocab_size=ROWS, **(WIDE | head | TYPES[name] | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases that count
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder("builtin:demo-opt")).save_pretrained(folder)
    return folder


def adapted(
    base: Path,
    folder: Path,
    variant: str = "lora",
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "down_proj"),
    facts: dict[str, Any] | None = None,
    **settings: Any,
) -> AdapterFolder:
    """An adapter whose tensors are all random, in its folder."""
    config = config_class(variant)(rank=4, **settings)
    model = load_model(base, torch.float32)
    wrapped = wrap_model(model, config, TargetsConfig(modules=list(targets)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    folder.mkdir(parents=True)
    write_adapter(folder, wrapped, facts or {}, str(base))
    return read_adapter(folder)
