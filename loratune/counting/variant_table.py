"""The variants' parameters side by side, for any model with known shapes."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.adapters.config import AdapterConfig
from loratune.adapters.registry import variant_names
from loratune.config.recipes.variant_settings import variant_settings
from loratune.config.schema import ModelConfig, RunConfig, trained_tokens
from loratune.counting.budget import BudgetMatch, match_budget, parse_budget
from loratune.counting.parameters import FP32_BYTES, ParameterReport, count_variants
from loratune.errors import ConfigError, did_you_mean
from loratune.models.architectures import Architecture
from loratune.models.measure import find_architecture
from loratune.models.quantized.choice import base_bytes, shapes_to_quantize
from loratune.models.quantized.format import Quantization, quantization_of
from loratune.targets.find import TargetMatch, find_targets, refusals

if TYPE_CHECKING:
    from loratune.counting.activations import ActivationReport
    from loratune.surgery import WrappedModel


@dataclass(frozen=True)
class VariantTable:
    """The answer to ``count-params``.

    Attributes:
        report: the counts, one entry a variant.
        notes: what the columns mean and what was left out, one sentence each.
        matches: the rank of each variant within a budget, where one was asked for.
        activations: what autograd keeps, one a variant, where that was asked for.
    """

    report: ParameterReport
    notes: tuple[str, ...]
    matches: tuple[BudgetMatch, ...] = ()
    activations: tuple[ActivationReport, ...] = ()

    def to_dict(self, *, per_module: bool = False) -> dict[str, Any]:
        """The same as plain data, for JSON; the list of layers only if asked."""
        report = self.report.to_dict()
        if not per_module:
            for variant in report["variants"]:  # type: ignore[attr-defined]
                del variant["modules"]
        result = {**report, "notes": list(self.notes)}
        if self.matches:
            result["matches"] = [asdict(match) for match in self.matches]
        if self.activations:
            result["activations"] = [asdict(measured) for measured in self.activations]
        return result


def count_table(
    config: RunConfig,
    names: Sequence[str] | None = None,
    rank: int | None = None,
    *,
    match: str | None = None,
    activations: bool = False,
    folders: Sequence[Path] = (),
) -> VariantTable:
    """Count what each variant adds to the recipe's model and targets.

    Args:
        config: the recipe; its adapter is counted as it is set, the others by their own recipes.
        names: variants, in this order; ``None`` takes every one that can adapt the targets.
        rank: for every variant, in place of its own.
        match: a budget (``trainable:N``, ``bytes:N``) to find ranks for.
        activations: also measure what autograd keeps (this imports torch).
        folders: the user's recipe folders.

    Raises:
        LoratuneError: an unknown variant, model or target, or an impossible number.
    """
    architecture = find_architecture(config.model)
    matched = find_targets(
        architecture.layers,
        config.targets,
        family=architecture.family,
        others=architecture.other_types,
        stacked=architecture.stacked_experts,
        unusable=architecture.unusable,
        base_parameters=architecture.base_parameters,
    )
    # A budget chooses the ranks: what a variant refuses at its own may do at a lower one.
    configs = variant_configs(config.adapter, names, rank if match is None else 1, folders)
    quantization = quantization_of(config.model)
    is_quantized = quantization is not None
    fitting, left_out = _fitting(configs, matched, strict=names is not None, quantized=is_quantized)
    notes = [*matched.notices, *left_out]
    saved = config.targets.modules_to_save
    matches: list[BudgetMatch] = []
    if match is not None:
        budget = parse_budget(match)
        matches = match_budget(architecture, matched.shapes, fitting, budget, modules_to_save=saved)
        ranks = [one.rank or 1 for one in matches]
        fitting = [c.with_rank(rank) for c, rank in zip(fitting, ranks, strict=True)]
    tokens = len(trained_tokens(config))
    report = count_variants(
        architecture, matched.shapes, fitting, modules_to_save=saved, tokens=tokens
    )
    if quantization is not None:
        notes.append(_stored_base(architecture, quantization))
    notes += _meaning(report) + _unusual(fitting if rank is not None else [], folders)
    measured: tuple[ActivationReport, ...] = ()
    if activations:
        from loratune.counting.activations import measure_activations

        measured = tuple(measure_activations(architecture, config.targets, c) for c in fitting)
    return VariantTable(report, tuple(notes), tuple(matches), measured)


def variant_configs(
    chosen: AdapterConfig,
    names: Sequence[str] | None = None,
    rank: int | None = None,
    folders: Sequence[Path] = (),
) -> list[AdapterConfig]:
    """One configuration a variant: the chosen one as it is, the others by their own recipes.

    Variants whose own recipe has the rank of the chosen one's recipe follow a rank that was set
    for it, so that the rows compare like with like.

    Raises:
        ConfigError: for a variant that does not exist, or a rank below 1.
    """
    available = variant_names()
    for name in names or ():
        if name not in available:
            fix = did_you_mean(name, available) or f"choose among {', '.join(available)}, or all"
            raise ConfigError(f"no adapter variant named '{name}'", where="variants", fix=fix)
    usual = variant_settings(chosen.variant, folders).rank
    configs = []
    for name in names or available:
        own = chosen if name == chosen.variant else variant_settings(name, folders)
        if own is not chosen and own.rank == usual:
            own = _at_rank_of(chosen, own)
        configs.append(own if rank is None else own.with_rank(rank))
    return configs


def _at_rank_of(chosen: AdapterConfig, own: AdapterConfig) -> AdapterConfig:
    """Another variant at the chosen one's ranks, as far as it has them."""
    own = own.with_rank(chosen.rank)
    if "rank_pattern" in own.without_effect:
        return own
    return replace(own, rank_pattern=dict(chosen.rank_pattern))


def _fitting(
    configs: Sequence[AdapterConfig], matched: TargetMatch, *, strict: bool, quantized: bool
) -> tuple[list[AdapterConfig], list[str]]:
    """The variants that can adapt the layers, and why the others cannot."""
    fitting, left_out = [], []
    for config in configs:
        reasons = [*refusals(config, matched.shapes)]
        if quantized and (why_not := config.why_not_quantized()):
            reasons.append((why_not, "model.quantize"))
        if not reasons:
            fitting.append(config)
            continue
        reason, name = reasons[0]
        if strict:
            raise ConfigError(reason, where=name, fix="leave the variant or the layer out")
        left_out.append(f"{config.variant} is left out: {reason} ({name})")
    return fitting, left_out


def _stored_base(architecture: Architecture, quantization: Quantization) -> str:
    """What the quantized base takes, and a weight of it."""
    chosen = shapes_to_quantize(architecture.layers, quantization)
    weights = sum(shape.in_features * shape.out_features for shape in chosen)
    packed = sum(quantization.bytes_of(s.out_features, s.in_features) for s in chosen)
    whole = base_bytes(architecture.layers, architecture.base_parameters, quantization, FP32_BYTES)
    return (
        f"base in {quantization.kind}: {8 * packed / weights:.2f} bits a weight with its scales in "
        f"{len(chosen)} layers, {whole:,} bytes in all with the rest in fp32 "
        f"({architecture.base_parameters * FP32_BYTES:,} without)"
    )


def _meaning(report: ParameterReport) -> list[str]:
    """The denominators, and what the stored numbers are."""
    lines = [
        f"% of base: trainable / {report.base_parameters:,} (base parameters, tied weights counted "
        "once); % of base + adapter, as PEFT prints it: trainable / "
        + ", ".join(f"{row.total:,} ({row.variant})" for row in report.variants),
        "optimizer bytes: AdamW's two fp32 moments of every trainable number",
    ]
    frozen = [row.variant for row in report.variants if row.stored > row.trainable]
    if frozen:
        lines.append(f"stored: the frozen numbers are in the file too ({', '.join(frozen)})")
    for row in report.variants:
        if row.shared:
            lines.append(
                f"{row.variant}: {row.shared:,} frozen numbers are random matrices that all "
                f"{report.layers} layers share, counted once"
            )
    return lines


def _unusual(configs: Sequence[AdapterConfig], folders: Sequence[Path]) -> list[str]:
    """A forced rank that is far from what a variant's own recipe uses."""
    usual = {c.variant: variant_settings(c.variant, folders).rank for c in configs}
    return [
        f"{c.variant} at rank {c.rank}: its own recipe uses {usual[c.variant]}"
        for c in configs
        if max(c.rank, usual[c.variant]) >= 16 * min(c.rank, usual[c.variant])
    ]


def report_variants(architecture: Architecture, wrapped: WrappedModel) -> ParameterReport:
    """Count a run's own variant, and every other one that can adapt the same layers."""
    quantized = any(layer.weight_blocks is not None for layer in wrapped.adapters.values())
    variants = variant_configs(wrapped.config)
    fitting, _ = _fitting(variants, wrapped.match, strict=False, quantized=quantized)
    saved = list(wrapped.saved_modules)
    tokens = next((len(rows.token_ids) for rows in wrapped.token_rows.values()), 0)
    return count_variants(
        architecture, wrapped.match.shapes, fitting, modules_to_save=saved, tokens=tokens
    )


def own_numbers(model: ModelConfig, keys: Set[str]) -> ModelConfig:
    """``model`` without the numbers of another model.

    A group file names a path and that model's numbers.  Where the command line names another
    path, the numbers left behind are not its own: a folder has its ``config.json``, and a hub id
    is asked for one.

    Args:
        model: as composed.
        keys: those that the command line sets.
    """
    if "model.path" in keys and not any(key.startswith("model.architecture") for key in keys):
        return replace(model, architecture=None)
    return model
