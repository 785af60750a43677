"""Which layers of a model's blocks play a role in attention or in the feed-forward part.

A block's attention is the module that holds both a query and a value projection; its feed-forward
part is the module whose layers lead from the block's width to an inner width and back.  Names say
the rest, by the words that libraries of models share.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from loratune.adapters.config import LayerKind, LayerPlace, LayerShape

ROLE_WORDS: dict[str, tuple[str, ...]] = {
    "attention_qv": ("query", "value"),
    "attention": ("query", "key", "value", "output"),
    "mlp": ("mlp",),
}
"""Word of ``targets.modules`` to the roles it stands for (``all_linear`` goes by type)."""

_LETTERS = {"q": "query", "k": "key", "v": "value"}
_OUTPUT = {"o", "out", "output", "dense", "proj"}
_FEED_FORWARD = {"mlp", "ffn", "ff", "feed", "feedforward", "moe", "expert"}
_FEED_FORWARD_LAYER = {"up", "down", "fc", "intermediate"}
# What wraps the one linear layer of a module, and says nothing of its role.
_WRAPPED = {"dense", "linear", "layer"}
_NUMBERED = re.compile(r"(.*?\.[^.]*)\.(\d+)\.(.*)")
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


@dataclass(frozen=True, slots=True)
class RoleLayers:
    """The layers that a role word stands for.

    Attributes:
        names: path inside a block to the full names of its layers, in the model's order.
        extra: path to the roles it plays beside those that were asked for.
        blocks: how many blocks there are to have them.
        missing: role to how many of these blocks have no layer that plays it; the word itself
            stands for all of its roles.
        towers: models inside the model that the word does not mean.
    """

    names: Mapping[str, Sequence[str]]
    extra: Mapping[str, Sequence[str]]
    blocks: int
    missing: Mapping[str, int]
    towers: Sequence[str]


@dataclass(frozen=True)
class _Layer:
    """A layer of a numbered block.

    Attributes:
        stack: what is numbered, and the number.
        path: what the layer is called inside the block; further numbers are ``*``.
        shape: the layer.
        owner: ``path`` of the module whose layers are looked at together.
        name: what the layer is called there, its wrapper left out.
    """

    stack: tuple[str, int]
    path: str
    shape: LayerShape
    owner: str
    name: str

    @cached_property
    def words(self) -> list[str]:
        return list(_words(self.name))

    def roles(self) -> set[str]:
        """Query, key and value, where the name says so: ``q_proj``, ``qkv_proj``, ``value``."""
        found = {word for word in self.words if word in _LETTERS.values()}
        for word in self.words:
            letters = set(word.removesuffix("z"))
            if letters <= set(_LETTERS):
                found |= {_LETTERS[letter] for letter in letters}
        if "attn" in self.words:
            found |= set(_LETTERS.values())
        return found


def find_role_layers(shapes: Sequence[LayerShape], word: str) -> RoleLayers | None:
    """The layers of the text model's blocks that ``word`` stands for, or ``None`` if none do."""
    blocks = _blocks(shape for shape in shapes if shape.place is LayerPlace.text)
    attention = {stack: _attention(layers, _holders(blocks)) for stack, layers in blocks.items()}
    if word == "mlp":
        width = _width(shapes, blocks)
        played = {
            stack: {layer: {"mlp"} for layer in _feed_forward(layers, attention[stack], width)}
            for stack, layers in blocks.items()
        }
    else:
        played = attention
    return _chosen(word, played, _tower_names(shapes))


def _blocks(shapes: Iterable[LayerShape]) -> dict[tuple[str, int], list[_Layer]]:
    """The linear layers of every numbered block."""
    parts = defaultdict(list)
    for shape in shapes:
        match = _NUMBERED.fullmatch(shape.name)
        if match and shape.kind in (LayerKind.linear, LayerKind.conv1d):
            parts[match.group(1), int(match.group(2))].append((match.group(3), shape))
    return {stack: _layers(stack, inside) for stack, inside in parts.items()}


def _layers(stack: tuple[str, int], inside: Sequence[tuple[str, LayerShape]]) -> list[_Layer]:
    siblings = Counter(path.rpartition(".")[0] for path, _ in inside)
    layers = []
    for path, shape in inside:
        owner, _, name = path.rpartition(".")
        if owner and name in _WRAPPED and siblings[owner] == 1:
            owner, _, name = owner.rpartition(".")
        path, owner = (re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", text) for text in (path, owner))
        layers.append(_Layer(stack, path, shape, owner, name))
    return layers


def _words(name: str) -> Iterator[str]:
    """``Wqkv`` is qkv, ``fc1`` is fc, ``dense_h_to_4h`` is dense, h, to and h."""
    for word in _WORDS.findall(name):
        plain = word.lower()
        yield plain[1:] if re.fullmatch("w(q?k?v?|o)", plain) and len(plain) > 1 else plain


# -- attention -----------------------------------------------------------------------------


def _holders(blocks: Mapping[tuple[str, int], Sequence[_Layer]]) -> set[str]:
    """Paths of the modules that hold queries and values in some block, the outermost only.

    Attention to another sequence, and what only selects positions inside an attention, are not
    meant.
    """
    held: dict[tuple[tuple[str, int], str], set[str]] = defaultdict(set)
    for stack, layers in blocks.items():
        for layer in layers:
            held[stack, layer.owner] |= layer.roles()
    owners = {
        owner
        for (stack, owner), roles in held.items()
        if {"query", "value"} <= roles and not _attends_elsewhere(stack[0], owner)
    }
    return {
        path for path in owners if not any(_is_within(path, other) for other in owners - {path})
    }


def _attends_elsewhere(stack: str, owner: str) -> bool:
    return "cross" in _words(f"{stack}.{owner}") or "encoder" in _words(owner)


def _is_within(path: str, other: str) -> bool:
    return bool(other) and path.startswith(f"{other}.")


def _attention(layers: Sequence[_Layer], holders: set[str]) -> dict[_Layer, set[str]]:
    """The layers of one block's attention with their roles."""
    played = {layer: layer.roles() for layer in layers if layer.owner in holders}
    played = {layer: roles for layer, roles in played.items() if roles}
    for holder in {layer.owner for layer in played}:
        rest = [layer for layer in layers if layer not in played and _is_output(layer)]
        around = holder.rpartition(".")[0]
        inside = [layer for layer in rest if layer.owner == holder]
        outputs = inside or [layer for layer in rest if around and layer.owner == around]
        played |= {layer: {"output"} for layer in outputs}
    return played


def _is_output(layer: _Layer) -> bool:
    """``o_proj``, ``out_proj``, ``dense``, ``c_proj``, ``Wo``; but not ``output_gate``."""
    first, *rest = layer.words or [""]
    named = first in _OUTPUT or (first in ("c", "attention") and bool(_OUTPUT & {*rest}))
    return named and "gate" not in rest


# -- feed-forward --------------------------------------------------------------------------


def _width(shapes: Sequence[LayerShape], blocks: Mapping[tuple[str, int], Sequence[_Layer]]) -> int:
    """Width of what flows from block to block: the embedding's, or the most common one."""
    inputs = Counter(layer.shape.in_features for layers in blocks.values() for layer in layers)
    embeddings = [
        shape.out_features
        for shape in shapes
        if shape.kind is LayerKind.embedding and shape.place is LayerPlace.text
    ]
    common = max(inputs, key=inputs.__getitem__, default=0)
    return next((width for width in embeddings if width in inputs), common)


def _feed_forward(
    layers: Sequence[_Layer], attention: Mapping[_Layer, set[str]], width: int
) -> list[_Layer]:
    """The layers of one block that lead from ``width`` to an inner width and back."""
    roots: dict[str, list[_Layer]] = defaultdict(list)
    for layer in layers:
        if layer not in attention and "norm" not in layer.path.lower():
            roots[_root(layer)].append(layer)
    chosen = []
    for root, members in roots.items():
        named = bool(root) and bool(_FEED_FORWARD & _singular(root.rpartition(".")[2]))
        named |= any(_FEED_FORWARD_LAYER & {*layer.words} for layer in members)
        named |= bool(_FEED_FORWARD & _singular(members[0].stack[0].rpartition(".")[2]))
        if named:
            chosen += _there_and_back(members, width)
    return [layer for layer in layers if layer in chosen]


def _singular(name: str) -> set[str]:
    words = set(_words(name))
    return words | {word.removesuffix("s") for word in words}


def _root(layer: _Layer) -> str:
    """The innermost module around the layer that is called a feed-forward part, or its owner."""
    parts = layer.owner.split(".")
    for end in range(len(parts), 0, -1):
        if _FEED_FORWARD & _singular(parts[end - 1]):
            return ".".join(parts[:end])
    return layer.owner


def _there_and_back(members: Sequence[_Layer], width: int) -> list[_Layer]:
    """Layers from ``width`` to an inner width (or two of it, fused) and those back from it."""
    chosen = []
    for back in members:
        inner = back.shape.in_features
        there = [
            layer
            for layer in members
            if layer is not back
            and layer.shape.in_features == width
            and layer.shape.out_features in (inner, 2 * inner)
        ]
        if back.shape.out_features == width and there:
            chosen += [*there, back]
    return chosen


# -- the answer ----------------------------------------------------------------------------


def _chosen(
    word: str, played: Mapping[tuple[str, int], Mapping[_Layer, set[str]]], towers: Sequence[str]
) -> RoleLayers | None:
    wanted = ROLE_WORDS[word]
    names = defaultdict(list)
    extra: dict[str, list[str]] = {}
    having: dict[tuple[str, int], set[str]] = {}
    for stack, layers in played.items():
        having[stack] = set()
        for layer, roles in layers.items():
            if roles & {*wanted}:
                names[layer.path].append(layer.shape.name)
                having[stack] |= roles & {*wanted}
                if roles - {*wanted}:
                    extra[layer.path] = sorted(roles - {*wanted})
    if not names:
        return None
    stacks = {stack for (stack, _), roles in having.items() if roles}
    counted = [roles for (stack, _), roles in having.items() if stack in stacks]
    missing = {role: sum(bool(roles) and role not in roles for roles in counted) for role in wanted}
    missing[word] = sum(not roles for roles in counted)
    missing = {role: count for role, count in missing.items() if count}
    return RoleLayers(names, extra, len(counted), missing, towers)


def _tower_names(shapes: Sequence[LayerShape]) -> list[str]:
    """The numbered or named parts outside the text model, each by the name before its blocks."""
    names = [shape.name for shape in shapes if shape.place is LayerPlace.tower]
    stacks = [match.group(1) for name in names if (match := _NUMBERED.fullmatch(name))]
    return list(dict.fromkeys(stacks or names))
