"""Architectures of any model: from numbers where the family is known, else built without weights.

Building happens on torch's meta device: real names and shapes, no memory, no files but
``config.json``.  torch and transformers are imported only then.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loratune.adapters.config import LayerKind, LayerPlace, LayerShape
from loratune.config.schema import ModelConfig
from loratune.errors import ModelError
from loratune.models.architectures import (
    STACKED_EXPERTS,
    Architecture,
    OtherModule,
    architecture_from_numbers,
    is_known_family,
)
from loratune.models.build import meta_model, outline, read_transformers_config
from loratune.models.source import local_folder, read_config
from loratune.models.towers import tower_prefixes

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
    return _probed(measure_model(meta_model(config, str(source)), config.to_dict()))


def measure_numbers(numbers: Mapping[str, Any]) -> Architecture:
    """The same for the numbers of a ``config.json`` of any family that transformers has.

    Raises:
        ModelError: if transformers cannot build it.
    """
    return _probed(measure_model(outline(numbers), numbers))


def _probed(architecture: Architecture) -> Architecture:
    """With the layers that no adapter can do anything for."""
    from loratune.models.probes.layers import unusable_layers

    unusable: Mapping[str, str] = {}
    with contextlib.suppress(ModelError):  # what cannot be trained can still be counted
        unusable = unusable_layers(outline(architecture.numbers))
    return replace(architecture, unusable=unusable)


def measure_model(model: nn.Module, numbers: Mapping[str, Any] | None = None) -> Architecture:
    """The architecture of a model in memory; tied weights are counted once."""
    layers = tuple(layer_shapes(model))
    total = count_numbers(model)
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    others = other_modules(model, {layer.name for layer in layers})
    return Architecture(str(family), layers, others, total, dict(numbers or {}))


def count_numbers(model: nn.Module) -> int:
    """Numbers in the model, tied weights counted once and quantized ones one by one."""
    from loratune.adapters.kernels.blocks import blocks_of

    packed: dict[int, int] = {
        id(module.weight): module.in_features * module.out_features
        for module in cast(Iterable[Any], model.modules())
        if blocks_of(module) is not None
    }
    return sum(packed.get(id(one), one.numel()) for one in model.parameters())


def layer_shapes(model: nn.Module) -> list[LayerShape]:
    """Every layer of the model that an adapter can wrap, in ``named_modules`` order."""
    from loratune.adapters.kernels.blocks import blocks_of

    shapes = []
    owners: dict[int, str] = {}
    head, towers = _output_head(model), tower_prefixes(model)
    for name, module in model.named_modules():
        place = LayerPlace.tower if f"{name}.".startswith(towers) else LayerPlace.text
        kind_and_size = _kind_and_size(module)
        if kind_and_size is None:
            shapes += _stacked_shapes(name, module, place)
            continue
        parameters = sum(p.numel() for p in module.parameters(recurse=False))
        if blocks_of(module) is not None:
            parameters += math.prod(kind_and_size[1:]) - module.weight.numel()
        place = LayerPlace.head if module is head else place
        owner = owners.setdefault(id(module.weight), name)
        tied_to = "" if owner == name else owner
        shapes.append(LayerShape(name, *kind_and_size, parameters, place, tied_to=tied_to))
    return shapes


def _stacked_shapes(name: str, module: nn.Module, place: LayerPlace) -> list[LayerShape]:
    """The layers of experts that a module stacks; it says itself if they are (in, out), as in PEFT.

    A tensor of two dimensions does not say where one expert ends, and is left out.
    """
    shapes = []
    for key, tensor in expert_tensors(name, module).items():
        if tensor.dim() != 3:
            continue
        experts, rows, columns = tensor.shape
        kind, sizes = LayerKind.experts, (columns, rows)
        if getattr(module, "is_transposed", False):
            kind, sizes = LayerKind.experts_conv1d, (rows, columns)
        shapes.append(LayerShape(f"{name}.{key}", kind, *sizes, tensor.numel(), place, experts))
    return shapes


def _output_head(model: nn.Module) -> object:
    """The model's own output head, whatever its name; a plain module has none."""
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def stacked_experts(model: nn.Module) -> dict[str, int]:
    """Tensors that stack a layer of every expert, by name, with their numbers.

    They are parameters and not layers, so nothing can be put in their place.
    """
    return {
        f"{name}.{key}": tensor.numel()
        for name, module in model.named_modules()
        if _kind_and_size(module) is None
        for key, tensor in expert_tensors(name, module).items()
    }


def expert_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters that stack what every expert has: weights, and their biases.

    The module says so: it lies in one called ``experts``, or has a number of experts that is the
    tensor's first dimension.
    """
    own = dict(module.named_parameters(recurse=False))
    if "experts" in name.split("."):
        return {key: tensor for key, tensor in own.items() if tensor.dim() > 1}
    counts = [value for key, value in vars(module).items() if "expert" in key]
    return {
        key: tensor for key, tensor in own.items() if tensor.dim() == 3 and len(tensor) in counts
    }


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
    """What has parameters and is not a layer: modules, and stacked tensors that stay frozen."""
    others = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if name in layer_names or not own:
            continue
        experts = expert_tensors(name, module)
        for key, tensor in experts.items():
            if f"{name}.{key}" in layer_names:
                continue
            others.append(OtherModule(f"{name}.{key}", STACKED_EXPERTS, tensor.numel()))
        rest = sum(tensor.numel() for key, tensor in own.items() if key not in experts)
        if rest:
            others.append(OtherModule(name, type(module).__name__, rest))
    return tuple(others)
