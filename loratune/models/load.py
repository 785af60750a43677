"""A base model from local files: device, dtype, weights and tokenizer, each strictly."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loratune.config.schema import Dtype, Precision
from loratune.errors import ConfigError, LoratuneError, ModelError, raise_together
from loratune.models.source import refuse_tokenizer_code

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
        raise _no_device(name) from error
    if device.type not in ("cpu", "cuda"):
        raise _no_device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is here", where="model.device", fix="model.device=cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(
            f"'{name}' is not here", where="model.device", fix=f"cuda:0 to {count - 1}"
        )
    return device


def _no_device(name: str) -> ConfigError:
    return ConfigError(
        f"'{name}' is no device", where="model.device", fix="auto, cpu, cuda or cuda:N"
    )


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
                "float16 does not train on a CPU",
                where="model.dtype",
                fix="use float32 or bfloat16",
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
    device: torch.device | str = "cpu",
    attention: str = "auto",
) -> nn.Module:
    """A model folder's weights in eval mode; nothing may be missing, misshapen or left over.

    Raises:
        ModelError: naming every tensor that does not fit, or why transformers cannot load it.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    _quiet()
    read_transformers_config(folder)
    options: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that they are listed, by us, with both shapes
            output_loading_info=True,
            **options,
        )
    except LoratuneError:
        raise
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, ImportError, TypeError) as error:
        is_attention = attention != "auto" and "attention" in str(error).lower()
        where = f"model.attention={attention}" if is_attention else str(folder)
        fix = "model.attention=auto" if is_attention else "check config.json and the weights"
        cause = f"cannot load the model: {first_line(error)}"
        raise ModelError(cause, where=where, fix=fix) from error
    raise_together(_loading_problems(info, folder))
    # Answers follow from what a command says, not from the model's own generation settings.
    model.generation_config = transformers.GenerationConfig()
    placed: nn.Module = model.to(device).eval()
    return placed


def _quiet() -> None:
    """No progress bars and no advice from transformers between our own lines."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def first_line(error: BaseException) -> str:
    """The first sentence of a library's message, on one line."""
    if isinstance(error, KeyError):
        return f"there is no {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return (text or type(error).__name__)[:300].rstrip(". ")


def read_transformers_config(folder: Path) -> Any:
    """``config.json`` as transformers understands it.

    Raises:
        ModelError: an architecture it does not know, or a value of the wrong type.
    """
    from transformers import AutoConfig

    _quiet()
    try:
        return AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # each architecture validates in its own way
        cause = f"unusable config.json: {first_line(error)}"
        fix = "restore the file that belongs to the weights"
        raise ModelError(cause, where=str(folder / "config.json"), fix=fix) from error


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


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: if there is none or it is broken.
        SecurityError: if it asks for code of its own, or for files outside the folder.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        fix = "copy tokenizer.json (or vocab.json and merges.txt) of the model into the folder"
        raise ModelError("the model folder has no tokenizer", where=str(folder), fix=fix)
    refuse_tokenizer_code(folder)
    read_transformers_config(folder)
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises its own kinds, and plain Exception
        cause = f"cannot load the tokenizer: {first_line(error)}"
        raise ModelError(cause, where=str(folder), fix="restore its files") from error
