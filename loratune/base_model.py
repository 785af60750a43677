"""A base model from local files: device, dtype, weights and tokenizer, each strictly."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loratune.config.schema import Dtype, Precision
from loratune.errors import ConfigError, LoratuneError, ModelError, raise_together

_TORCH = {
    Dtype.float32: torch.float32,
    Dtype.bfloat16: torch.bfloat16,
    Dtype.float16: torch.float16,
}


def resolve_device(name: str) -> torch.device:
    """The device that ``model.device`` means.

    Raises:
        ConfigError: if there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"'{name}' is no device", where="model.device", fix="cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is here", where="model.device", fix="model.device=cpu")
    return device


def resolve_dtype(
    dtype: Dtype, precision: Precision, device: torch.device, stored: torch.dtype
) -> torch.dtype:
    """Number format of the base: explicit dtype, else the precision's, else what is fast here.

    Raises:
        ConfigError: if dtype and precision contradict each other, or the device cannot do it.
    """
    wanted = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}.get(precision)
    if dtype is not Dtype.auto:
        explicit = _TORCH[dtype]
        if explicit is torch.float16 and device.type == "cpu":
            raise ConfigError(
                "float16 does not train on a CPU", where="model.dtype", fix="use float32 or bfloat16"
            )
        if wanted is not None and wanted is not explicit:
            raise ConfigError(
                f"model.dtype={dtype} and trainer.precision={precision} contradict each other",
                where="model.dtype",
                fix="set one of them to auto",
            )
        return explicit
    if wanted is not None:
        return wanted
    if device.type == "cuda":
        return stored if stored is not torch.float32 else torch.bfloat16
    return torch.bfloat16 if has_native_bf16() else torch.float32


def has_native_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware."""
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device = torch.device("cpu"),
    attention: str = "auto",
) -> nn.Module:
    """A model folder's weights in eval mode; nothing may be missing, misshapen or left over.

    Raises:
        ModelError: naming every tensor that does not fit, or why transformers cannot load it.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    options: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except LoratuneError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = "model.attention" if "attn" in line.lower() else str(folder)
        raise ModelError(f"cannot load the model: {line}", where=where) from error
    raise_together(_loading_problems(info, folder))
    # Answers follow from what a command says, not from the model's own generation settings.
    model.generation_config = transformers.GenerationConfig()
    placed: nn.Module = model.to(device).eval()
    return placed


def _loading_problems(info: Any, folder: Path) -> list[LoratuneError]:
    """transformers fills a missing tensor with random numbers and goes on; we do not."""
    problems: list[LoratuneError] = []
    for name in sorted(info.get("missing_keys", ())):
        problems.append(ModelError(f"the base lacks tensor '{name}'", where=str(folder)))
    for item in info.get("mismatched_keys", ()):
        name, have, want = (*item, None, None)[:3] if isinstance(item, tuple) else (item, None, None)
        problems.append(
            ModelError(f"tensor '{name}' has shape {have}, the model wants {want}", where=str(folder))
        )
    for name in sorted(info.get("unexpected_keys", ())):
        problems.append(ModelError(f"the base has an unexpected tensor '{name}'", where=str(folder)))
    return problems


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: if there is none or it is broken.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises its own kinds, and plain Exception
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"cannot load the tokenizer: {line}", where=str(folder)) from error
