"""Device and number format of the base: what the recipe says, or what is fast here."""

from __future__ import annotations

import os

import torch

from loratune.config.schema import Dtype, Precision
from loratune.errors import ConfigError
from loratune.models.dtypes import safetensors_name, torch_dtype


def resolve_device(name: str) -> torch.device:
    """The device that ``model.device`` means.

    Raises:
        ConfigError: if there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _no_device(name) from error
    if device.type not in ("cpu", "cuda"):
        raise _no_device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "there is no CUDA device here", where="model.device", fix="model.device=cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(
            f"there is no '{name}' here", where="model.device", fix=f"cuda:0 to {count - 1}"
        )
    if device.type == "cuda":
        _choose_libraries()
    return device


def _choose_libraries() -> None:
    """What of CUDA's libraries may run, for the rest of this process.

    torch reads cuBLAS's workspace at the first matrix product, and is deterministic only where it
    was named; the size is the one that it takes by itself on Hopper.  There it also prefers
    cuDNN's attention, which plans every new shape on the host for tens of milliseconds, while
    rows of unlike length and growing answers bring a new shape at almost every call.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.enable_cudnn_sdp(False)


def _no_device(name: str) -> ConfigError:
    return ConfigError(
        f"no such device: '{name}'", where="model.device", fix="auto, cpu, cuda or cuda:N"
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
        explicit = torch_dtype(safetensors_name(dtype))
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
