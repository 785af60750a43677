"""Architectures of any model: from numbers where the family is known, else built without weights.

Building happens on torch's meta device: real names and shapes, no memory, no files but
``config.json``.  torch and transformers are imported only then.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.adapters.config import LayerKind, LayerShape
from loratune.config.schema import ModelConfig
from loratune.models.architectures import (
    STACKED_EXPERTS,
    Architecture,
    OtherModule,
    architecture_from_numbers,
    is_known_family,
)
from loratune.models.build import build_model, meta_model, read_transformers_config
from loratune.models.source import local_folder, read_config

if TYPE_CHECKING:
    from torch import Tensor, nn


def find_architecture(model: ModelConfig) -> Architecture:
    """The architecture of the model that a recipe names.

    A local folder's own ``config.json`` comes first, then the numbers in the recipe, then the
    hub (its ``config.json`` alone is fetched).

    Raises:
        ModelError: if none of them gives one.
        ConfigError: if a number is missing or impossible.
    """
    folder = local_folder(model.path)
    if folder is not None:
        numbers = read_config(folder)
        if is_known_family(numbers):
            return architecture_from_numbers(numbers, where=str(folder / "config.json"))
        return measure_source(folder)
    if model.architecture is not None:
        if is_known_family(model.architecture):
            return architecture_from_numbers(model.architecture)
        return measure_numbers(model.architecture)
    return measure_source(model.path, model.revision)


def measure_source(source: Path | str, revision: str | None = None) -> Architecture:
    """The architecture of a folder's or the hub's model, built without weights.

    Raises:
        ModelError: if transformers cannot build it.
    """
    config = read_transformers_config(source, revision)
    return measure_model(meta_model(config, str(source)), config.to_dict())


def measure_numbers(numbers: Mapping[str, Any]) -> Architecture:
    """The same for the numbers of a ``config.json`` of any family that transformers has.

    Raises:
        ModelError: if transformers cannot build it.
    """
    import torch

    with torch.device("meta"):
        return measure_model(build_model(numbers), numbers)


def measure_model(model: nn.Module, numbers: Mapping[str, Any] | None = None) -> Architecture:
    """The architecture of a model in memory; tied weights are counted once."""
    layers = tuple(layer_shapes(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    others = other_modules(model, {layer.name for layer in layers})
    return Architecture(str(family), layers, others, total, dict(numbers or {}))


def layer_shapes(model: nn.Module) -> list[LayerShape]:
    """Every layer of the model that an adapter can wrap, in ``named_modules`` order."""
    shapes = []
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        kind_and_size = _kind_and_size(module)
        if kind_and_size is not None:
            parameters = sum(p.numel() for p in module.parameters(recurse=False))
            owner = owners.setdefault(id(module.weight), name)
            tied_to = "" if owner == name else owner
            shapes.append(LayerShape(name, *kind_and_size, parameters, tied_to))
    return shapes


def stacked_experts(model: nn.Module) -> dict[str, int]:
    """Tensors that stack a layer of every expert, by name, with their numbers.

    They are parameters and not layers, so nothing can be put in their place.
    """
    return {
        f"{name}.{key}": tensor.numel()
        for name, module in model.named_modules()
        for key, tensor in expert_tensors(module).items()
    }


def expert_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters of more than two dimensions; a convolution's are its kernel."""
    from torch import nn

    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return {}
    own = module.named_parameters(recurse=False)
    return {key: tensor for key, tensor in own if tensor.dim() > 2}


def _kind_and_size(module: nn.Module) -> tuple[LayerKind, int, int] | None:
    from torch import Tensor, nn

    if isinstance(module, nn.Linear):
        return LayerKind.linear, module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and isinstance(module.weight, Tensor):
        rows, columns = module.weight.shape
        return LayerKind.conv1d, rows, columns
    # Other subclasses with a forward of their own (OPT's positions) are not plain lookups.
    is_lookup = type(module) is nn.Embedding or hasattr(module, "embed_scale")
    if isinstance(module, nn.Embedding) and is_lookup:
        return LayerKind.embedding, module.num_embeddings, module.embedding_dim
    return None


def other_modules(model: nn.Module, layer_names: set[str]) -> tuple[OtherModule, ...]:
    """Modules with parameters of their own that are not layers, and every stacked expert tensor."""
    others = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if name in layer_names or not own:
            continue
        experts = expert_tensors(module)
        for key, tensor in experts.items():
            others.append(OtherModule(f"{name}.{key}", STACKED_EXPERTS, tensor.numel()))
        rest = sum(tensor.numel() for key, tensor in own.items() if key not in experts)
        if rest:
            others.append(OtherModule(name, type(module).__name__, rest))
    return tuple(others)
