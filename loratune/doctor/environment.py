"""The machine: Python, processor, graphics, disk, and environment variables that do harm."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

from loratune import files
from loratune.doctor.finding import Finding, Status
from loratune.errors import LoratuneError
from loratune.models.devices import has_native_bf16
from loratune.models.quantized.library import import_bitsandbytes

_ENOUGH_DISK = 1 << 30


def check_environment() -> list[Finding]:
    """One finding for every property of the machine that training depends on."""
    return [_python(), _threads(), _bf16(), _cuda(), _disk(), _quantized(), *_variables()]


def _python() -> Finding:
    detail = platform.python_version()
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return Finding("python", Status.ok, detail)
    return Finding("python", Status.warn, f"{detail} is not tested", "use Python 3.11 to 3.13")


def _threads() -> Finding:
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    detail = f"{threads} of {cores} cores"
    if threads > cores:
        return Finding("threads", Status.warn, detail, f"set trainer.threads={cores}")
    return Finding("threads", Status.ok, detail)


def _bf16() -> Finding:
    detail = "native on this processor" if has_native_bf16() else "emulated: fp32 is used on CPU"
    return Finding("bf16", Status.ok, detail)


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        return Finding("cuda", Status.ok, "none: training runs on the CPU")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding("cuda", Status.ok, ", ".join(names))


def _quantized() -> Finding:
    try:
        library = import_bitsandbytes()
    except LoratuneError as error:
        fix = f"only for model.quantize: {error.fix}"
        return Finding("bitsandbytes", Status.warn, error.cause, fix)
    return Finding("bitsandbytes", Status.ok, f"{library.__version__}: nf4, fp4 and int8 bases")


def _disk() -> Finding:
    free = files.free_bytes(Path("outputs").absolute())
    detail = f"{free / 2**30:.1f} GB free for outputs"
    if free < _ENOUGH_DISK:
        return Finding("disk", Status.warn, detail, "free some space, or choose another out=DIR")
    return Finding("disk", Status.ok, detail)


_HARMFUL = {
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "lets other programs load pickled code",
    "HF_HUB_DISABLE_SAFETENSORS": "asks for pickled weights",
    "PYTHONINSPECT": "keeps failed runs alive",
}


def _variables() -> list[Finding]:
    return [
        Finding(name, Status.warn, f"is set: {harm}", f"unset {name}")
        for name, harm in _HARMFUL.items()
        if os.environ.get(name)
    ]
