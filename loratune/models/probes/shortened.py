"""A small copy of a model that still does everything the model does: one block of each kind."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from loratune.models.towers import tower_prefixes

_MOST_KINDS = 8
"""Blocks of a copy: models repeat a pattern of fewer kinds."""
_MOST_WORDS = 1024
"""Words of a copy: the tables of words are the largest part of many models."""
_MOST_NUMBERS = 1_000_000_000
"""Parameters of a block beyond the first kind that is made up with random ones."""
_SPREAD = 0.02
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)
"""What a model raises that cannot take such inputs at all."""


@dataclass(frozen=True)
class ShortCopy:
    """A small copy of a model.

    Attributes:
        model: the copy.
        prefix: what the names of the blocks' modules begin with; empty if all were copied.
        places: for every block of the model the place of the copy's that stands for it.
        emptied: what the names of modules begin with that text never reaches: their weights are
            not in the copy.
    """

    model: nn.Module
    prefix: str = ""
    places: tuple[int, ...] = ()
    emptied: tuple[str, ...] = ()

    def name_of(self, name: str) -> str:
        """The name of the module that stands for the model's module ``name``."""
        if not self.prefix or not name.startswith(self.prefix):
            return name
        number, dot, rest = name.removeprefix(self.prefix).partition(".")
        return f"{self.prefix}{self.places[int(number)]}{dot}{rest}"


def shortened(model: nn.Module) -> nn.Module:
    """The model of ``short_copy``."""
    return short_copy(model).model


_OUTLINES: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def keep_outline(model: nn.Module) -> None:
    """Keep a copy of a model without its parameters' data: soon it can itself not be copied."""
    parameters = list(model.parameters())
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in parameters}
    _OUTLINES[model] = copy.deepcopy(model, empty)


@torch.no_grad()
def short_copy(model: nn.Module) -> ShortCopy:
    """A frozen fp32 copy in evaluation mode with one block of each kind, on the same device.

    The copy of a model without data (on the meta device) lies on the CPU and has random weights.
    Two blocks are of one kind if their modules have the same types, shapes and settings but for
    the block's own number.  Lists of the model's config with an entry for every block are cut
    alike, and so are tables of words.  The weights of towers for images or sound are left out.  A
    model that does not run so is copied with all blocks, or all words, or whole.  Of a model with
    an outline that is copied.
    """
    model = _OUTLINES.get(model, model)
    towers = tower_prefixes(model)
    blocks = _blocks(model, towers)
    stand_ins = [] if blocks is None else _stand_ins(blocks)
    chosen = sorted(set(stand_ins))
    words, unread = _few_words(model), _without_numbers(model, towers)
    attempts = [{**words, **unread}, *([unread] if words else []), *([{}] if unread else [])]
    for others in attempts:
        emptied = towers if others and unread else ()
        if blocks is not None:
            with _only(blocks, chosen):
                small = _copied(model, others)
            for module in small.modules():
                if hasattr(config := getattr(module, "config", None), "__dict__"):
                    _cut_lists(config, len(blocks), chosen)
            if _runs(small := _frozen(small), emptied):
                prefix = next(f"{name}." for name, m in model.named_modules() if m is blocks)
                places = tuple(map(chosen.index, stand_ins))
                return ShortCopy(small, prefix, places, emptied)
        if others and _runs(small := _frozen(_copied(model, others)), emptied):
            return ShortCopy(small, emptied=emptied)
    return ShortCopy(_frozen(_copied(model, {})))


def _few_words(model: nn.Module) -> dict[int, torch.Tensor]:
    """The beginning of every tensor with an entry for each word, by the tensor's ``id``."""
    find: Any = getattr(model, "get_input_embeddings", None)
    words = 0
    with suppress(NotImplementedError):  # a model that does not say where they are
        words = len(find().weight) if find is not None else 0
    cut: dict[int, torch.Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()] if words > _MOST_WORDS else []:
        if words in tensor.shape:
            few = tensor.detach().narrow(tensor.shape.index(words), 0, _MOST_WORDS).clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            cut[id(tensor)] = nn.Parameter(few, requires_grad=False) if is_parameter else few
    return cut


def _without_numbers(model: nn.Module, towers: tuple[str, ...]) -> dict[int, torch.Tensor]:
    """A stand-in of one NaN for every parameter of the towers, by the parameter's ``id``."""
    stand_ins: dict[int, torch.Tensor] = {}
    for name, parameter in model.named_parameters() if towers else ():
        if name.startswith(towers) and parameter.is_floating_point():
            device = "cpu" if parameter.is_meta else parameter.device
            nan = torch.empty([1] * parameter.dim(), device=device).fill_(torch.nan)
            stand_ins[id(parameter)] = nn.Parameter(nan, requires_grad=False)
    return stand_ins


def _copied(model: nn.Module, others: dict[int, torch.Tensor]) -> nn.Module:
    """A copy that holds ``others`` in the place of tensors, by their ``id``."""
    # Some models keep states of their last pass, which autograd would not let us copy.
    states = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    ]
    small = copy.deepcopy(model, {**others, **{id(state): state.detach() for state in states}})
    for module in small.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            fits = module.padding_idx < len(module.weight)
            module.padding_idx = module.padding_idx if fits else None
    return small


def _runs(model: nn.Module, emptied: tuple[str, ...]) -> bool:
    """Whether a model takes a short row of text, and reads none of what was emptied."""
    device = next(model.parameters()).device
    try:
        output = model(input_ids=torch.arange(1, 4, device=device)[None], use_cache=False)
        return not (emptied and output.logits.isnan().any())
    except FAILURES:
        return False


def _frozen(model: nn.Module) -> nn.Module:
    if any(parameter.is_meta for parameter in model.parameters()):
        model = _with_random_weights(model)
    return model.float().eval().requires_grad_(False)


def _with_random_weights(model: nn.Module) -> nn.Module:
    """A model without data with its own kind of start, and nothing that is zero throughout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        filled: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
        for module in model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    setattr(module, key, torch.zeros(buffer.shape, dtype=buffer.dtype))
            own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
            # Those of a tower are what they are; the others were, when they had no data.
            vars(module)["_is_hf_initialized"] = any(not one.is_meta for one in own.values())
            for key, parameter in own.items():
                if not parameter.is_meta:
                    continue
                if parameter not in filled:
                    zeros = torch.zeros(parameter.shape, dtype=parameter.dtype)
                    filled[parameter] = nn.Parameter(zeros)
                module.register_parameter(key, filled[parameter])
        if callable(start := getattr(model, "init_weights", None)):
            # Last it ties weights: of blocks that are not there, or of layers with an adapter too.
            with suppress(AttributeError, KeyError):
                start()
        for parameter in filled.values():
            if not parameter.any():
                parameter.normal_(std=_SPREAD)
    return model


def _blocks(model: nn.Module, towers: tuple[str, ...]) -> nn.ModuleList | None:
    """The list of modules that holds the most parameters, outside the towers."""
    text = [module for name, module in model.named_modules() if not name.startswith(towers)]
    lists = [module for module in text if isinstance(module, nn.ModuleList) and len(module) > 1]
    sizes = [sum(p.numel() for p in one.parameters()) for one in lists]
    return lists[sizes.index(max(sizes))] if lists else None


def _stand_ins(blocks: nn.ModuleList) -> list[int]:
    """For every block the number of the first of its kind, or of the last kind that is copied."""
    kinds: dict[Hashable, int] = {}
    settings = [_settings(block) for block in blocks]
    numbered = {key for one in settings for key in one} - {
        key
        for number, one in enumerate(settings)
        for key, value in one.items()
        if type(value) is not int or value != number
    }
    stand_ins = []
    for number, values in enumerate(settings):
        kind = tuple((key, value) for key, value in values.items() if key not in numbered)
        is_too_many = len(kinds) == _MOST_KINDS or (kinds and _is_too_large(blocks[number]))
        if kind not in kinds and is_too_many:
            number = max(kinds.values())
        stand_ins.append(kinds.setdefault(kind, number))
    return stand_ins


def _is_too_large(block: nn.Module) -> bool:
    """Whether a block without data would take too much memory with some."""
    parameters = list(block.parameters())
    return all(p.is_meta for p in parameters) and sum(p.numel() for p in parameters) > _MOST_NUMBERS


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
