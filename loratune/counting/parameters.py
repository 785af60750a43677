"""How many numbers each variant trains, freezes, stores and optimizes: closed forms, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from loratune.adapters.config import AdapterConfig, AdapterCount, LayerKind, LayerShape
from loratune.config.schema import TargetsConfig
from loratune.errors import ModelError, did_you_mean
from loratune.models.architectures import Architecture
from loratune.targets.find import find_targets, rank_for, targets_of

FP32_BYTES = 4
ADAMW_BYTES = 2 * FP32_BYTES
"""Bytes of AdamW's two fp32 moments per trained number."""


@dataclass(frozen=True, slots=True)
class ModuleCount:
    """What one layer, or one module trained in full, adds; shared matrices belong to none."""

    name: str
    kind: str
    in_features: int
    out_features: int
    rank: int
    trainable: int
    frozen: int


@dataclass(frozen=True, slots=True)
class VariantCount:
    """What one variant adds to the model.

    Attributes:
        trainable: numbers that training changes, modules trained in full among them.
        frozen: numbers of the adapter that stay at their random start.
        shared: the frozen numbers that all layers share (among ``frozen``).
        stored: numbers in the adapter file.
        stored_bytes: their bytes, without the file's header.
        optimizer_bytes: AdamW's two fp32 moments of every trainable number.
        percent_of_base: trainable over the base model's parameters.
        percent_of_total: trainable over base and adapter together, as PEFT prints it; shared
            matrices are buffers there and do not count.
        total: the denominator of ``percent_of_total``.
    """

    variant: str
    rank: int
    trainable: int
    frozen: int
    shared: int
    stored: int
    stored_bytes: int
    optimizer_bytes: int
    percent_of_base: float
    percent_of_total: float
    total: int
    modules: tuple[ModuleCount, ...]


@dataclass(frozen=True, slots=True)
class ParameterReport:
    """The variants of one model and one set of targets, side by side.

    Attributes:
        base_parameters: numbers in the base model, tied weights counted once.
        layers: how many layers get an adapter.
        bytes_per_number: in the adapter file.
    """

    family: str
    base_parameters: int
    layers: int
    bytes_per_number: int
    variants: tuple[VariantCount, ...]

    def to_dict(self) -> dict[str, object]:
        """The same as plain data, for JSON."""
        return asdict(self)


def count_variants(
    architecture: Architecture,
    matched: Sequence[LayerShape],
    configs: Sequence[AdapterConfig],
    *,
    modules_to_save: Sequence[str] = (),
    tokens: int = 0,
    bytes_per_number: int = FP32_BYTES,
) -> ParameterReport:
    """Count what each variant adds to ``matched`` layers.

    Args:
        architecture: the base model.
        matched: layers to adapt, from ``find_targets``.
        configs: one per variant.
        modules_to_save: names of modules trained in full and stored with the adapter.
        tokens: number of tokens whose own rows train.
        bytes_per_number: of the adapter file; 4 is fp32.

    Raises:
        ModelError: if a module to save does not exist.
    """
    variants = tuple(
        count_in(
            architecture,
            matched,
            config,
            modules_to_save,
            tokens=tokens,
            bytes_per_number=bytes_per_number,
        )
        for config in configs
    )
    return ParameterReport(
        architecture.family, architecture.base_parameters, len(matched), bytes_per_number, variants
    )


def count_in(
    architecture: Architecture,
    matched: Sequence[LayerShape],
    config: AdapterConfig,
    modules_to_save: Sequence[str] = (),
    *,
    tokens: int = 0,
    bytes_per_number: int = FP32_BYTES,
) -> VariantCount:
    """Count what one variant adds to a model; one that trains all of it needs no targets.

    Raises:
        ModelError: if a module to save does not exist.
    """
    if config.trains_whole_model():
        everything = targets_of(config, TargetsConfig(), architecture)
        matched = find_targets(architecture.layers, everything).shapes
        modules_to_save = everything.modules_to_save
    saved = saved_modules(architecture, modules_to_save) | _token_rows(architecture, tokens)
    return count_variant(architecture.base_parameters, matched, config, saved, bytes_per_number)


def _token_rows(architecture: Architecture, tokens: int) -> dict[str, int]:
    """Numbers of trained tokens in each embedding: one row a token; a tied head has no own."""
    tables = [layer for layer in architecture.layers if layer.kind is LayerKind.embedding]
    if not tokens or not tables:
        return {}
    vocabulary, width = tables[0].in_features, tables[0].out_features
    heads = [
        layer.name
        for layer in architecture.layers[-1:]
        if layer.kind is LayerKind.linear and layer.out_features == vocabulary and not layer.tied_to
    ]
    return {f"{name} (tokens)": tokens * width for name in (tables[0].name, *heads)}


def count_variant(
    base_parameters: int,
    matched: Sequence[LayerShape],
    config: AdapterConfig,
    saved: Mapping[str, int] | None = None,
    bytes_per_number: int = FP32_BYTES,
) -> VariantCount:
    """Count what one variant adds; ``saved`` maps modules trained in full to their size."""
    saved = saved or {}
    planned = [(shape, rank_for(shape.name, config)) for shape in matched]
    modules = [_count_module(shape, rank, config) for shape, rank in planned]
    modules += [ModuleCount(name, "trained in full", 0, 0, 0, n, 0) for name, n in saved.items()]
    added = config.count(planned) + AdapterCount(sum(saved.values()), 0)
    shared = added.frozen - sum(module.frozen for module in modules)
    stored = config.stored(added)
    total = base_parameters + added.trainable + added.frozen - shared
    return VariantCount(
        variant=config.variant,
        rank=config.rank,
        trainable=added.trainable,
        frozen=added.frozen,
        shared=shared,
        stored=stored,
        stored_bytes=stored * bytes_per_number,
        optimizer_bytes=added.trainable * ADAMW_BYTES,
        percent_of_base=_percent(added.trainable, base_parameters),
        percent_of_total=_percent(added.trainable, total),
        total=total,
        modules=tuple(modules),
    )


def _count_module(shape: LayerShape, rank: int, config: AdapterConfig) -> ModuleCount:
    own = config.count_layer(shape, rank)
    sizes = shape.in_features, shape.out_features
    return ModuleCount(shape.name, str(shape.kind), *sizes, rank, own.trainable, own.frozen)


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


def saved_modules(architecture: Architecture, names: Sequence[str]) -> dict[str, int]:
    """Full name to size of every module that ``names`` call.

    Raises:
        ModelError: if a name calls none.
    """
    saved: dict[str, int] = {}
    for name in names:
        modules = architecture.parameters_of(name)
        if not modules:
            tails = {part.name.rpartition(".")[2] for part in architecture.parts}
            raise ModelError(
                f"no module is named '{name}'",
                where="targets.modules_to_save",
                fix=did_you_mean(name, tails) or "name a module of the model, such as lm_head",
            )
        saved.update(modules)
    return saved
