"""An adapter alone as GGUF, to run beside a GGUF base (``--lora``)."""

from __future__ import annotations

from pathlib import Path

from gguf import GGMLQuantizationType, GGUFWriter, Keys
from torch import Tensor

from loratune.adapter_files.offline import MetaAdapter
from loratune.adapter_files.peft_config import PREFIX
from loratune.adapter_files.plain_lora import plain_lora
from loratune.errors import ModelError
from loratune.gguf_files.architectures import architecture_of
from loratune.gguf_files.streaming import PlannedTensor, write_tensors
from loratune.gguf_files.tensors import TensorNames

_SUFFIXES = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}
"""PEFT's names of the factors, and llama.cpp's."""


def write_adapter(offline: MetaAdapter, path: Path) -> str:
    """Write an adapter as plain LoRA whose alpha is its rank, all scaling in B, in fp32.

    llama.cpp reads one alpha a file and multiplies by alpha / rank, here 1.

    Args:
        offline: the adapter on its base's names and shapes.
        path: the file, which must not exist.

    Returns:
        llama.cpp's name of the architecture.

    Raises:
        ModelError: if the adapter is not plain LoRA on layers that llama.cpp adapts.
    """
    where = str(offline.folder.path)
    if offline.unties:
        raise ModelError(
            "the adapter corrects the head of a tied model: a GGUF base has one tensor for both",
            where=where,
            fix="export format=gguf",
        )
    config = offline.config
    architecture = architecture_of(config, str(offline.base_folder))
    names = TensorNames(config, architecture, where)
    settings, tensors = plain_lora([offline], [1.0])
    writer = GGUFWriter(None, architecture.name)
    writer.add_type("adapter")
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(settings["lora_alpha"]))
    write_tensors(writer, path, _planned(tensors, names, where))
    return architecture.name


def _planned(tensors: dict[str, Tensor], names: TensorNames, where: str) -> list[PlannedTensor]:
    planned = []
    for key, value in tensors.items():
        suffix = next((one for one in _SUFFIXES if key.endswith(one)), None)
        module = key.removeprefix(PREFIX).removesuffix(suffix or "")
        if suffix is None:
            raise ModelError(
                f"GGUF adapters are written for linear layers, and '{module}' is an embedding",
                where=where,
                fix="export format=gguf",
            )
        planned.append(_factor(f"{module}.weight", _SUFFIXES[suffix], value, names))
    return planned


def _factor(weight: str, suffix: str, value: Tensor, names: TensorNames) -> PlannedTensor:
    """A as it is (r, in); B (out, r) with its rows in llama.cpp's order."""
    ordered = names.rows(weight, value) if suffix == ".lora_b" else value
    name, kind = f"{names.name(weight)}{suffix}", GGMLQuantizationType.F32
    return PlannedTensor(name, tuple(value.shape), kind, lambda: ordered)
