"""A small copy of a model that still does everything the model does: one block of each kind."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_MOST_KINDS = 8
"""Blocks of a copy: models repeat a pattern of fewer kinds."""


@torch.no_grad()
def shortened(model: nn.Module) -> nn.Module:
    """A frozen fp32 copy in evaluation mode with one block of each kind, on the same device.

    Two blocks are of one kind if their modules have the same types, shapes and settings but for
    the block's own number.  Lists of the model's config with an entry for every block are cut
    alike.
    """
    blocks = _blocks(model)
    if blocks is None:
        return _frozen(copy.deepcopy(model))
    chosen = _one_of_each_kind(blocks)
    with _only(blocks, chosen):
        small = copy.deepcopy(model)
    for module in small.modules():
        if hasattr(config := getattr(module, "config", None), "__dict__"):
            _cut_lists(config, len(blocks), chosen)
    return _frozen(small)


def _frozen(model: nn.Module) -> nn.Module:
    return model.float().eval().requires_grad_(False)


def _blocks(model: nn.Module) -> nn.ModuleList | None:
    """The list of modules that holds the most parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    sizes = [sum(p.numel() for p in one.parameters()) for one in lists]
    return lists[sizes.index(max(sizes))] if lists else None


def _one_of_each_kind(blocks: nn.ModuleList) -> list[int]:
    kinds: dict[Hashable, int] = {}
    settings = [_settings(block) for block in blocks]
    numbered = {
        key for key in settings[0] if all(one.get(key) == n for n, one in enumerate(settings))
    }
    for number, values in enumerate(settings):
        kind = tuple((key, value) for key, value in values.items() if key not in numbered)
        kinds.setdefault(kind, number)
    return sorted(kinds.values())[:_MOST_KINDS]


def _settings(block: nn.Module) -> dict[tuple[str, str], Hashable]:
    """Types, shapes and plain settings of a block's modules."""
    values: dict[tuple[str, str], Hashable] = {}
    for name, module in block.named_modules():
        values[name, "type"] = type(module).__qualname__
        for key, parameter in module.named_parameters(recurse=False):
            values[name, key] = tuple(parameter.shape)
        for key, value in sorted(vars(module).items()):
            if isinstance(value, (bool, int, float, str)):
                values[name, key] = value
    return values


@contextmanager
def _only(blocks: nn.ModuleList, chosen: list[int]) -> Iterator[None]:
    """The list with these blocks alone, whole again afterwards."""
    whole = dict(blocks._modules)
    blocks._modules = {str(n): whole[str(number)] for n, number in enumerate(chosen)}
    try:
        yield
    finally:
        blocks._modules = whole


def _cut_lists(config: Any, count: int, chosen: list[int]) -> None:
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == count:
            # Past the config's own check, which would compare it with the number of blocks.
            vars(config)[key] = [value[number] for number in chosen]
