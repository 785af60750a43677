"""The layers of a model that an adapter can wrap."""

from __future__ import annotations

import torch
from torch import nn

from loratune.adapters.config import LayerKind, LayerShape


def layer_shapes(model: nn.Module) -> list[LayerShape]:
    """Every layer of the model that an adapter can wrap, in ``named_modules`` order."""
    shapes = []
    for name, module in model.named_modules():
        kind_and_size = _kind_and_size(module)
        if kind_and_size is not None:
            kind, in_features, out_features = kind_and_size
            parameters = sum(p.numel() for p in module.parameters(recurse=False))
            shapes.append(LayerShape(name, kind, in_features, out_features, parameters))
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


def expert_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters of more than two dimensions; a convolution's are its kernel."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return {}
    own = module.named_parameters(recurse=False)
    return {key: tensor for key, tensor in own if tensor.dim() > 2}


def _kind_and_size(module: nn.Module) -> tuple[LayerKind, int, int] | None:
    if isinstance(module, nn.Linear):
        return LayerKind.linear, module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and isinstance(module.weight, torch.Tensor):
        rows, columns = module.weight.shape
        return LayerKind.conv1d, rows, columns
    # Subclasses with another forward (OPT's positions) are not plain lookups.
    if isinstance(module, nn.Embedding) and _is_plain_lookup(module):
        return LayerKind.embedding, module.num_embeddings, module.embedding_dim
    return None


def _is_plain_lookup(module: nn.Embedding) -> bool:
    return type(module) is nn.Embedding or hasattr(module, "embed_scale")
