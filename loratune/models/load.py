"""A base model from local files: weights and tokenizer, each strictly."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loratune.errors import LoratuneError, ModelError, raise_together
from loratune.models.build import (
    auto_class,
    empty_model,
    first_line,
    read_transformers_config,
)
from loratune.models.quantized.format import Quantization, stored_quantization
from loratune.models.quantized.library import import_bitsandbytes
from loratune.models.reading import Reader
from loratune.models.untrusted import check_tokenizer


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    attention: str = "auto",
    quantization: Quantization | None = None,
) -> nn.Module:
    """A model folder's weights in eval mode; nothing may be missing, misshapen or left over.

    Args:
        folder: the model's; one whose tensors are quantized is loaded as it is.
        dtype: number format of what is not quantized.
        device: where to.
        attention: as ``model.attention``.
        quantization: of the linear layers, where they are to be quantized as they are read.

    Raises:
        ModelError: naming every tensor that does not fit, or why transformers cannot load it.
    """
    quantization = quantization or stored_quantization(folder)
    read = _read if quantization is None else partial(_read_quantized, quantization=quantization)
    model, info = read(folder, dtype, attention)
    raise_together(_loading_problems(info, folder))
    _keep_ends_alone(model)
    placed: nn.Module = model.to(device).eval()
    return placed


def load_without_parameters(folder: Path, dtype: torch.dtype, attention: str = "auto") -> nn.Module:
    """A model folder's model with its buffers, its parameters on the meta device, in eval mode.

    Whether the files fit is seen from their headers; a ``Reader`` gives the parameters' values.

    Args:
        folder: the model's.
        dtype: number format of the parameters.
        attention: as ``model.attention``.

    Raises:
        ModelError: naming every tensor that does not fit, or why transformers cannot build it.
    """
    model: Any = empty_model(folder, dtype, attention).requires_grad_(False)
    reader = Reader(model, folder, dtype)
    for name, parameter in model.named_parameters():
        reader.has(name, parameter)
    reader.note_unexpected(())
    raise_together(_loading_problems(reader.misfits.as_loading_info(), folder))
    for name, module in model.named_modules():
        reader.fill_buffers(name, module)
    _keep_ends_alone(model)
    loaded: nn.Module = model
    return loaded


def _keep_ends_alone(model: Any) -> None:
    """Answers follow from what a command says; of the model's own settings, its ends count."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends)


def _read_quantized(
    folder: Path, dtype: torch.dtype, attention: str, *, quantization: Quantization
) -> tuple[Any, Any]:
    """The model, and what of its files does not fit, as transformers tells it."""
    import_bitsandbytes()
    from loratune.models.quantized.streaming import load_quantized

    model, misfits = load_quantized(folder, dtype, attention, quantization)
    return model, misfits.as_loading_info()


def _read(folder: Path, dtype: torch.dtype, attention: str) -> tuple[Any, Any]:
    """The model as transformers loads it, and what of its files does not fit."""
    config = read_transformers_config(folder)
    options: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        model, info = auto_class(config, str(folder)).from_pretrained(
            str(folder),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that they are listed, by us, with both shapes
            output_loading_info=True,
            **options,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, ImportError, TypeError) as error:
        is_attention = attention != "auto" and "attention" in str(error).lower()
        where = f"model.attention={attention}" if is_attention else str(folder)
        fix = "model.attention=auto" if is_attention else "check config.json and the weights"
        cause = f"cannot load the model: {first_line(error)}"
        raise ModelError(cause, where=where, fix=fix) from error
    return model, info


def _loading_problems(info: Any, folder: Path) -> list[LoratuneError]:
    """Transformers fills a missing tensor with random numbers and goes on; we do not."""
    mismatched = [
        f"'{name}' (stored {list(stored)}, config.json wants {list(wanted)})"
        for name, stored, wanted in sorted(info.get("mismatched_keys", ()))
    ]
    kinds = {
        "the base lacks": [f"'{name}'" for name in sorted(info.get("missing_keys", ()))],
        "the weights do not fit config.json:": mismatched,
        "config.json has no place for": [f"'{n}'" for n in sorted(info.get("unexpected_keys", ()))],
    }
    fix = "use the weights and the config.json of one model"
    return [
        ModelError(f"{kind} {_listed(names)}", where=str(folder), fix=fix)
        for kind, names in kinds.items()
        if names
    ]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} tensors: {shown}, ..." if len(names) > 3 else f"tensor {shown}"


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has a tokenizer's files."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: if there is none or it is broken.
        SecurityError: if it asks for code of its own, or for files outside the folder.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        fix = "copy tokenizer.json (or vocab.json and merges.txt) of the model into the folder"
        raise ModelError("the model folder has no tokenizer", where=str(folder), fix=fix)
    check_tokenizer(folder)
    read_transformers_config(folder)
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises its own kinds, and plain Exception
        cause = f"cannot load the tokenizer: {first_line(error)}"
        raise ModelError(cause, where=str(folder), fix="restore its files") from error
