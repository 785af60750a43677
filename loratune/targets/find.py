"""Which layers of a model get an adapter.  Works on names and shapes: no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratune.adapters.config import AdapterConfig, LayerShape
from loratune.config.schema import TargetsConfig
from loratune.errors import ConfigError, LoratuneError, ModelError, raise_together
from loratune.models.architectures import names_module
from loratune.targets.errors import left_out, unmatched, unsupported
from loratune.targets.patterns import fitting_keys, resolve_pattern
from loratune.targets.words import Pattern, block_of, read_patterns

__all__ = ["TargetMatch", "alpha_for", "block_of", "find_targets", "rank_for", "resolve_pattern"]


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
    strict: bool = True,
) -> TargetMatch:
    """Find the layers that ``targets`` names.

    Args:
        shapes: every layer that can be adapted, in the model's order.
        targets: modules, exclusions and blocks.
        config: the variant, asked whether it can adapt each layer; ``None`` asks nobody.
        family: ``model_type`` that role words resolve for.
        others: name to type of modules that cannot be adapted, named if a pattern means them.
        strict: every listed pattern must match; else one match in all is enough, as in PEFT.

    Raises:
        ConfigError: if the patterns are malformed, or a rank or alpha pattern fits no target.
        ModelError: for each pattern that matches nothing, and each layer the variant refuses.
        SecurityError: if a regular expression takes longer than a second.
    """
    patterns, notices = read_patterns(shapes, targets.modules, family)
    others = _without(others or {}, shapes)
    kept = _kept(shapes, targets)
    counts = {pattern.text: 0 for pattern in patterns}
    found = []
    for shape in shapes:
        hits = [pattern for pattern in patterns if pattern.matches(shape.name)]
        if hits and shape.name in kept:
            found.append(shape)
            for pattern in hits:
                counts[pattern.text] += 1
    errors = _pattern_errors(patterns, counts, shapes, others, strict=strict)
    if strict:
        errors += _selection_errors(shapes, targets)
    if config is not None and not errors:
        errors += _variant_errors(found, config)
        dead = dead_patterns(found, config)
        if strict:
            errors += [_dead_pattern(name, key, len(found)) for name, key in dead]
        else:
            notices += [
                f"{name} '{key}' of the adapter's file fits none of its {len(found)} layers, "
                "and has no effect"
                for name, key in dead
            ]
    raise_together(errors)
    return TargetMatch(tuple(found), counts, tuple(notices))


def rank_for(name: str, config: AdapterConfig) -> int:
    """The rank that applies to the layer ``name``."""
    return resolve_pattern(config.rank_pattern, name, config.rank, "adapter.rank_pattern")


def alpha_for(name: str, config: AdapterConfig) -> float | None:
    """The alpha that applies to the layer ``name``."""
    return resolve_pattern(config.alpha_pattern, name, config.alpha, "adapter.alpha_pattern")


# -- what is left out ----------------------------------------------------------------------


def _kept(shapes: Sequence[LayerShape], targets: TargetsConfig) -> set[str]:
    return {
        shape.name
        for shape in shapes
        if not any(names_module(name, shape.name) for name in targets.exclude)
        and not any(_is_inside(name, shape.name) for name in targets.modules_to_save)
        and (targets.layers is None or block_of(shape.name) in targets.layers)
    }


def _is_inside(owner: str, name: str) -> bool:
    """Whether the layer ``name`` is the module called ``owner``, or a part of it."""
    return f".{owner}." in f".{name}."


def _without(others: Mapping[str, str], shapes: Sequence[LayerShape]) -> dict[str, str]:
    """The modules that are neither layers nor containers of modules."""
    layers = {shape.name for shape in shapes}
    containers = {name.rpartition(".")[0] for name in (*others, *layers)}
    return {
        name: kind for name, kind in others.items() if name not in layers and name not in containers
    }


# -- what is wrong -------------------------------------------------------------------------


def _pattern_errors(
    patterns: Sequence[Pattern],
    counts: Mapping[str, int],
    shapes: Sequence[LayerShape],
    others: Mapping[str, str],
    *,
    strict: bool,
) -> list[LoratuneError]:
    errors: list[LoratuneError] = []
    missing: list[LoratuneError] = []
    for pattern in patterns:
        named = _meant(pattern, shapes, others)
        if named and (counts[pattern.text] == 0 or not pattern.is_expression):
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


def _meant(pattern: Pattern, shapes: Sequence[LayerShape], others: Mapping[str, str]) -> list[str]:
    """Modules that ``pattern`` names and that cannot be adapted."""
    named = [name for name in others if pattern.matches(name)]
    if named or pattern.is_expression:
        return named
    if any(_is_inside(pattern.text, shape.name) for shape in shapes):
        return []
    return [name for name in others if _is_inside(pattern.text, name)]


def _selection_errors(shapes: Sequence[LayerShape], targets: TargetsConfig) -> list[LoratuneError]:
    errors: list[LoratuneError] = []
    for name in targets.exclude:
        if not any(names_module(name, shape.name) for shape in shapes):
            errors.append(unmatched(name, shapes, where="targets.exclude"))
    if targets.layers is None:
        return errors
    blocks = {block_of(shape.name) for shape in shapes} - {None}
    absent = [layer for layer in targets.layers if layer not in blocks]
    if absent:
        errors.append(
            ModelError(
                f"the model has no block {', '.join(map(str, absent))}",
                where="targets.layers",
                fix=f"blocks are numbered 0 to {len(blocks) - 1}",
            )
        )
    return errors


def _variant_errors(found: Sequence[LayerShape], config: AdapterConfig) -> list[LoratuneError]:
    errors: list[LoratuneError] = []
    for shape in found:
        refusal = config.check_layer(shape)
        if refusal:
            fix = "leave it out with targets.exclude, or choose another adapter"
            errors.append(ModelError(refusal, where=shape.name, fix=fix))
    return errors


def dead_patterns(found: Sequence[LayerShape], config: AdapterConfig) -> list[tuple[str, str]]:
    """Name of the setting and key of every rank or alpha pattern that fits no adapted layer."""
    dead = []
    names = [shape.name for shape in found]
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
