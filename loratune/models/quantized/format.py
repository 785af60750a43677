"""Which quantization a base has: asked for by the recipe, or found in its ``config.json``.

Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loratune.config.schema import ModelConfig, Quantize
from loratune.errors import ConfigError, ModelError
from loratune.models.source import local_folder, read_config

BLOCK = 64
"""Numbers of a row that share one scale in 4 bits; bitsandbytes' default."""
SCALE_BLOCK = 256
"""Scales that share one scale of their own where they are quantized too."""
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Quantization:
    """How a base's linear layers are stored.

    Attributes:
        kind: nf4, fp4 or int8.
        double: whether the scales of 4-bit blocks are quantized as well.
        skip: names or suffixes of layers that stay as they are, beside the output head.
        in_files: whether the folder's own tensors are quantized, and not what is read from them.
    """

    kind: Quantize
    double: bool = False
    skip: tuple[str, ...] = ()
    in_files: bool = False

    @property
    def is_4bit(self) -> bool:
        """Whether two numbers share a byte."""
        return self.kind is not Quantize.int8

    def bytes_of(self, out_features: int, in_features: int) -> int:
        """Bytes of a weight (out, in) with its scales, bias excluded."""
        numbers = out_features * in_features
        if not self.is_4bit:
            return numbers + out_features * _SCALE_BYTES
        scales = numbers // BLOCK
        if self.double:
            tables = (-(-scales // SCALE_BLOCK) + 256 + 1) * _SCALE_BYTES
            return numbers // 2 + scales + tables
        return numbers // 2 + scales * _SCALE_BYTES

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a run's records."""
        return {**asdict(self), "kind": str(self.kind), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Quantization:
        """The inverse of ``to_dict``."""
        skip = tuple(str(name) for name in values["skip"])
        return cls(Quantize(values["kind"]), bool(values["double"]), skip, bool(values["in_files"]))


def identity(weights: str, quantization: Quantization | None) -> str:
    """The fingerprint of a base: of the weights in its files, and of how they are quantized."""
    if quantization is None or quantization.in_files:
        return weights
    facts = json.dumps([weights, quantization.to_dict(), BLOCK], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()


def find_quantization(folder: Path, config: ModelConfig | None = None) -> Quantization | None:
    """How the base in a folder will be stored in memory; ``None`` where it is not quantized.

    Raises:
        ModelError: if the folder is quantized by a method that cannot be trained here.
        ConfigError: if it is quantized and the recipe asks for it once more.
    """
    stored = stored_quantization(folder)
    if config is None or config.quantize is None:
        return stored
    if stored is not None:
        raise ConfigError(
            f"the model is quantized already ({stored.kind})",
            where=f"model.quantize={config.quantize}",
            fix="remove it, or set model.path to the model that is not quantized",
        )
    return _asked(config)


def quantization_of(config: ModelConfig) -> Quantization | None:
    """How the base that a recipe names will be stored in memory, as far as it is here.

    Raises:
        LoratuneError: as ``find_quantization``.
    """
    folder = local_folder(config.path)
    if folder is not None:
        return find_quantization(folder, config)
    return _asked(config)


def _asked(config: ModelConfig) -> Quantization | None:
    if config.quantize is None:
        return None
    return Quantization(config.quantize, config.quantize_double, tuple(config.quantize_skip))


def stored_quantization(folder: Path) -> Quantization | None:
    """How the tensors of a folder are quantized, from its ``config.json``.

    Raises:
        ModelError: a method other than bitsandbytes'.
    """
    settings = read_config(folder).get("quantization_config")
    if not isinstance(settings, dict):
        return None
    method = str(settings.get("quant_method", "")) or "an unnamed method"
    is_4bit, is_8bit = settings.get("load_in_4bit"), settings.get("load_in_8bit")
    if method != "bitsandbytes" or not (is_4bit or is_8bit):
        raise ModelError(
            f"the model is quantized by '{method}', whose kernels need a GPU and are not used here",
            where=str(folder / "config.json"),
            fix="set model.path to the model that is not quantized, and model.quantize=nf4",
        )
    kind = str(settings.get("bnb_4bit_quant_type", "fp4")) if is_4bit else "int8"
    double = bool(is_4bit and settings.get("bnb_4bit_use_double_quant"))
    return Quantization(Quantize(kind), double, in_files=True)


def config_entry(quantization: Quantization, skipped: list[str]) -> dict[str, Any]:
    """What ``config.json`` says of a folder whose tensors are quantized so, for transformers."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": quantization.is_4bit,
        "load_in_8bit": not quantization.is_4bit,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "bnb_4bit_quant_type": str(quantization.kind) if quantization.is_4bit else "fp4",
        "bnb_4bit_use_double_quant": quantization.double,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
    }
