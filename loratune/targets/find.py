"""Which layers of a model get an adapter.  Works on names and shapes: no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loratune.adapters.config import AdapterConfig, LayerShape
from loratune.config.schema import TargetsConfig
from loratune.errors import ConfigError, LoratuneError, ModelError, raise_together
from loratune.models.architectures import STACKED_EXPERTS, Architecture, names_module
from loratune.targets.errors import left_out, no_experts, unmatched, unsupported
from loratune.targets.patterns import (
    ALL_LINEAR,
    EXPERTS,
    Pattern,
    block_of,
    fitting_keys,
    is_word,
    read_patterns,
    resolve_pattern,
)
from loratune.targets.roles import ROLE_WORDS
from loratune.targets.unusable import left_out_notes, unusable_targets


@dataclass(frozen=True, slots=True)
class TargetMatch:
    """The layers to adapt.

    Attributes:
        shapes: in the model's order.
        counts: pattern to the number of layers it matched.
        notices: what a reader of the recipe might not expect, one sentence each.
    """

    shapes: tuple[LayerShape, ...]
    counts: Mapping[str, int]
    notices: tuple[str, ...] = ()


def find_targets(
    shapes: Sequence[LayerShape],
    targets: TargetsConfig,
    config: AdapterConfig | None = None,
    family: str | None = None,
    *,
    others: Mapping[str, str] | None = None,
    stacked: Mapping[str, int] | None = None,
    unusable: Mapping[str, str] | None = None,
    base_parameters: int = 0,
    strict: bool = True,
) -> TargetMatch:
    """Find the layers that ``targets`` names.

    Of the layers for which an adapter can do nothing, a word such as ``all_linear`` means none.

    Args:
        shapes: every layer that can be adapted, in the model's order.
        targets: modules, exclusions and blocks.
        config: the variant, asked whether it can adapt each layer; ``None`` asks nobody.
        family: ``model_type`` that role words resolve for.
        others: name to type of modules that cannot be adapted, named if a pattern means them.
        stacked: name to numbers of the tensors that hold a layer of every expert.
        unusable: layer to why an adapter can do nothing for it.
        base_parameters: numbers in the whole model, for shares of it; 0 where nobody asked.
        strict: every listed pattern must match; else one match in all is enough, as in PEFT.

    Raises:
        ConfigError: if the patterns are malformed, or a rank or alpha pattern fits no target.
        ModelError: for each pattern that matches nothing, each layer the variant refuses, and
            layers named one by one that are unusable.
        SecurityError: if a regular expression takes longer than a second.
    """
    every, unusable, stacked = shapes, unusable or {}, stacked or {}
    by_word = is_word(targets.modules)
    if by_word:
        shapes = [shape for shape in every if shape.name not in unusable]
    # A role is read off the whole structure; what no adapter can help is left out of it later.
    is_role = by_word and targets.modules in ROLE_WORDS
    patterns, notices = read_patterns(every if is_role else shapes, targets.modules, family)
    others = {n: kind for n, kind in _without(others or {}, every).items() if n not in stacked}
    matched, counts = _matched(shapes, patterns, targets)
    adapted, layers = {shape.name for shape in matched}, {shape.name for shape in every}
    frozen = {name: numbers for name, numbers in stacked.items() if name not in adapted}
    if strict and frozen:
        notices.append(frozen_experts(targets.modules, frozen, base_parameters))
    fixed = {name: numbers for name, numbers in stacked.items() if name not in layers}
    errors = _pattern_errors(patterns, counts, shapes, others, fixed, strict=strict)
    if by_word:
        notices += left_out_notes(
            str(targets.modules), _useless(every, targets, family, unusable), unusable, every
        )
    else:
        useless = [shape.name for shape in matched if shape.name in unusable]
        errors += unusable_targets(useless, unusable, every)
    if strict:
        errors += _selection_errors(every, targets)
    if config is not None and not errors:
        errors += _variant_errors(matched, config)
        for where, key in dead_patterns(matched, config):
            if strict:
                errors.append(_dead_pattern(where, key, len(matched)))
            else:
                fits = f"fits none of its {len(matched)} layers, and has no effect"
                notices.append(f"{where} '{key}' of the adapter's file {fits}")
    raise_together(errors)
    return TargetMatch(tuple(matched), counts, tuple(notices))


def targets_of(
    config: AdapterConfig, targets: TargetsConfig, architecture: Architecture
) -> TargetsConfig:
    """What a variant adapts and trains: the targets, or all of the model where it trains that.

    Raises:
        ConfigError: if the targets leave out a part of what the variant trains.
    """
    if not config.trains_whole_model():
        return targets
    for name in ("exclude", "layers"):
        if getattr(targets, name):
            raise ConfigError(
                "nothing can be left out where every parameter trains",
                where=f"targets.{name}",
                fix=f"remove it, or let adapter={config.variant} train the targets only",
            )
    return replace(targets, modules=".*", modules_to_save=list(architecture.outer_modules))


def frozen_experts(
    modules: str | Sequence[str], stacked: Mapping[str, int], base_parameters: int
) -> str:
    """What to say where a model's experts are out of reach of the targets."""
    names, frozen = list(stacked), sum(stacked.values())
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    share = f", {frozen / base_parameters:.1%} of the base" if base_parameters else ""
    word = modules if isinstance(modules, str) else ", ".join(modules)
    line = (
        f"{word} leaves {frozen:,} parameters of experts frozen{share}: {names[0]}{more}, stacked "
        "in one tensor each"
    )
    if modules in ALL_LINEAR:
        line += (
            "; PEFT's all-linear adapts the experts and the router of models that it converts "
            "from another layout (here: all_linear_and_experts)"
        )
    return line


def _matched(
    shapes: Sequence[LayerShape], patterns: Sequence[Pattern], targets: TargetsConfig
) -> tuple[list[LayerShape], dict[str, int]]:
    """The layers that a pattern names and no setting leaves out, and how many each names.

    A name of modules, as PEFT's, means stacked experts of that name only where it has no other
    meaning.
    """
    matched, counts = set(), {}
    for pattern in patterns:
        named = [shape for shape in shapes if pattern.matches(shape.name)]
        named = [shape for shape in named if not shape.is_stacked] or named
        chosen = {shape.name for shape in named if not _is_left_out(shape.name, targets)}
        counts[pattern.text] = len(chosen)
        matched |= chosen
    layers = [shape for shape in shapes if shape.name in matched]
    return [s if s.tied_to in matched else replace(s, tied_to="") for s in layers], counts


def _useless(
    shapes: Sequence[LayerShape],
    targets: TargetsConfig,
    family: str | None,
    unusable: Mapping[str, str],
) -> list[str]:
    """The layers that a word would mean if an adapter could do something for them."""
    if not unusable:
        return []
    patterns, _ = read_patterns(shapes, targets.modules, family)
    meant, _ = _matched(shapes, patterns, targets)
    return [shape.name for shape in meant if shape.name in unusable]


def rank_for(name: str, config: AdapterConfig) -> int:
    """The rank that applies to the layer ``name``."""
    return resolve_pattern(config.rank_pattern, name, config.rank, "adapter.rank_pattern")


def alpha_for(name: str, config: AdapterConfig) -> float | None:
    """The alpha that applies to the layer ``name``."""
    return resolve_pattern(config.alpha_pattern, name, config.alpha, "adapter.alpha_pattern")


def _is_left_out(name: str, targets: TargetsConfig) -> bool:
    return (
        any(names_module(excluded, name) for excluded in targets.exclude)
        or any(_is_inside(owner, name) for owner in targets.modules_to_save)
        or (targets.layers is not None and block_of(name) not in targets.layers)
    )


def _is_inside(owner: str, name: str) -> bool:
    """Whether the layer ``name`` is the module called ``owner``, or a part of it."""
    return f".{owner}." in f".{name}."


def _without(others: Mapping[str, str], shapes: Sequence[LayerShape]) -> dict[str, str]:
    """The modules that are neither layers nor containers of modules."""
    layers = {shape.name for shape in shapes}
    inner = layers | {name.rpartition(".")[0] for name in (*others, *layers)}
    return {name: kind for name, kind in others.items() if name not in inner}


def _pattern_errors(
    patterns: Sequence[Pattern],
    counts: Mapping[str, int],
    shapes: Sequence[LayerShape],
    others: Mapping[str, str],
    stacked: Mapping[str, int],
    *,
    strict: bool,
) -> list[LoratuneError]:
    errors: list[LoratuneError] = []
    missing: list[LoratuneError] = []
    for pattern in patterns:
        named = _meant(pattern, shapes, others)
        experts = _meant(pattern, shapes, stacked) if counts[pattern.text] == 0 else []
        if experts:
            missing.append(
                unsupported(pattern.text, experts, dict.fromkeys(stacked, STACKED_EXPERTS))
            )
        elif pattern.text == EXPERTS and not any(shape.is_stacked for shape in shapes):
            missing.append(no_experts(shapes))
        elif named and (counts[pattern.text] == 0 or not pattern.is_expression):
            errors.append(unsupported(pattern.text, named, others))
        elif counts[pattern.text] == 0:
            named = [shape.name for shape in shapes if pattern.matches(shape.name)]
            missing.append(
                left_out(pattern.text, named)
                if named
                else unmatched(pattern.text, shapes, is_expression=pattern.is_expression)
            )
    if strict or not any(counts.values()):
        errors += missing
    return errors


def _meant(
    pattern: Pattern, shapes: Sequence[LayerShape], others: Mapping[str, object]
) -> list[str]:
    """Modules that ``pattern`` names and that cannot be adapted."""
    named = [name for name in others if pattern.matches(name)]
    if named or pattern.is_expression:
        return named
    if any(_is_inside(pattern.text, shape.name) for shape in shapes):
        return []
    return [name for name in others if _is_inside(pattern.text, name)]


def _selection_errors(shapes: Sequence[LayerShape], targets: TargetsConfig) -> list[LoratuneError]:
    errors: list[LoratuneError] = [
        unmatched(name, shapes, where="targets.exclude")
        for name in targets.exclude
        if not any(names_module(name, shape.name) for shape in shapes)
    ]
    blocks = {block_of(shape.name) for shape in shapes} - {None}
    if absent := [str(layer) for layer in targets.layers or () if layer not in blocks]:
        cause = f"the model has no block {', '.join(absent)}"
        fix = f"blocks are numbered 0 to {len(blocks) - 1}"
        errors.append(ModelError(cause, where="targets.layers", fix=fix))
    return errors


def refusals(config: AdapterConfig, matched: Sequence[LayerShape]) -> Iterator[tuple[str, str]]:
    """Why a variant cannot adapt a layer at its rank there, and its name, for each such layer."""
    for shape in matched:
        if reason := config.check_layer(shape, rank_for(shape.name, config)):
            yield reason, shape.name


def _variant_errors(matched: Sequence[LayerShape], config: AdapterConfig) -> list[LoratuneError]:
    """One error for each reason, however many layers it refuses."""
    refused: dict[str, list[str]] = {}
    for reason, name in refusals(config, matched):
        refused.setdefault(reason, []).append(name)
    errors: list[LoratuneError] = []
    for refusal, names in refused.items():
        them, more = ("them", f" and {len(names) - 1} more") if len(names) > 1 else ("it", "")
        fix = f"leave {them} out with targets.exclude, or choose another adapter"
        errors.append(ModelError(refusal, where=f"{names[0]}{more}", fix=fix))
    return errors


def dead_patterns(matched: Sequence[LayerShape], config: AdapterConfig) -> list[tuple[str, str]]:
    """Name of the setting and key of every rank or alpha pattern that fits no adapted layer."""
    dead = []
    names = [shape.name for shape in matched]
    for where in ("rank_pattern", "alpha_pattern"):
        patterns: Mapping[str, object] = getattr(config, where)
        used = set(fitting_keys(patterns, names, f"adapter.{where}").values())
        dead += [(where, key) for key in patterns if key not in used]
    return dead


def _dead_pattern(where: str, key: str, layers: int) -> ConfigError:
    return ConfigError(
        f"'{key}' fits none of the {layers} adapted layers",
        where=f"adapter.{where}",
        fix="remove it, or name an adapted layer",
    )
