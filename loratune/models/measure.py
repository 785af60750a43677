"""Architectures of any model: from numbers where the family is known, else built without weights.

Building happens on torch's meta device: real names and shapes, no memory, no files but
``config.json``.  torch and transformers are imported only then.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.config.schema import ModelConfig
from loratune.errors import ModelError
from loratune.files import ASSETS, BUILTIN
from loratune.models.architectures import (
    Architecture,
    OtherModule,
    architecture_from_numbers,
    is_known_family,
)
from loratune.models.architectures.reading import read_config

if TYPE_CHECKING:
    from torch import nn

FUSED_EXPERTS = "3-D expert tensor"


def find_architecture(model: ModelConfig) -> Architecture:
    """The architecture of the model that a recipe names.

    A local folder's own ``config.json`` comes first, then the numbers in the recipe, then the
    hub (its ``config.json`` alone is fetched).

    Raises:
        ModelError: if none of them gives one.
        ConfigError: if a number is missing or impossible.
    """
    folder = _local_folder(model.path)
    if folder is not None:
        numbers = read_config(folder)
        if is_known_family(numbers):
            return architecture_from_numbers(numbers, where=str(folder / "config.json"))
        return measure_architecture(folder)
    if model.architecture is not None:
        if is_known_family(model.architecture):
            return architecture_from_numbers(model.architecture)
        return measure_numbers(model.architecture)
    return measure_architecture(model.path, revision=model.revision)


def _local_folder(path: str) -> Path | None:
    if path.startswith(BUILTIN):
        return ASSETS / path.removeprefix(BUILTIN)
    is_local = Path(path).is_dir() or path.startswith(("/", "./", "../", "~"))
    return Path(path).expanduser() if is_local else None


def measure_architecture(path: str | Path, revision: str | None = None) -> Architecture:
    """Build a model without weights and list what it is made of; runs no code from the folder.

    Raises:
        ModelError: if transformers cannot build it.
    """
    import torch
    from transformers import AutoConfig

    if isinstance(path, Path):
        read_config(path)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _cannot_build(error, str(path)) from error
    with torch.device("meta"):
        model = _build(config, str(path))
    return measure_model(model, config.to_dict())


def measure_numbers(numbers: Mapping[str, Any]) -> Architecture:
    """The same for the numbers of a ``config.json`` of any family that transformers has.

    Raises:
        ModelError: if transformers cannot build it.
    """
    import torch

    with torch.device("meta"):
        model = build_model(numbers)
    return measure_model(model, numbers)


def build_model(numbers: Mapping[str, Any]) -> nn.Module:
    """A model of these numbers with random weights, on torch's default device.

    Raises:
        ModelError: if transformers cannot build it.
    """
    from transformers import AutoConfig

    values = dict(numbers)
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, KeyError, TypeError) as error:
        raise _cannot_build(error, "model.architecture") from error
    return _build(config, "model.architecture")


def _build(config: Any, where: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        model: nn.Module = auto.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, ImportError) as error:
        raise _cannot_build(error, where) from error
    return model


def measure_model(model: nn.Module, numbers: Mapping[str, Any] | None = None) -> Architecture:
    """The architecture of a model that exists; tied weights are counted once."""
    from loratune.models.layers import layer_shapes

    layers = tuple(layer_shapes(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    others = other_modules(model, {layer.name for layer in layers})
    return Architecture(str(family), layers, others, total, dict(numbers or {}))


def other_modules(model: nn.Module, layer_names: set[str]) -> tuple[OtherModule, ...]:
    """Modules with parameters of their own that are no layers, and every 3-D expert tensor."""
    others = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if name in layer_names or not own:
            continue
        experts = {key: tensor for key, tensor in own.items() if tensor.dim() > 2}
        for key, tensor in experts.items():
            others.append(OtherModule(f"{name}.{key}", FUSED_EXPERTS, tensor.numel()))
        rest = sum(tensor.numel() for key, tensor in own.items() if key not in experts)
        if rest:
            others.append(OtherModule(name, type(module).__name__, rest))
    return tuple(others)


def _cannot_build(error: Exception, where: str) -> ModelError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ModelError(
        f"transformers cannot build this model: {reason[:300]}",
        where=where,
        fix="check model.path; models that need their own code are not supported",
    )
