"""The parameter report of a run: its own variant as it is, the others beside it."""

from __future__ import annotations

from loratune.adapters.config import AdapterConfig
from loratune.adapters.registry import config_class, variant_names
from loratune.counting.parameters import ParameterReport, count_variants
from loratune.models.architectures import Architecture
from loratune.surgery import WrappedModel


def report_variants(architecture: Architecture, wrapped: WrappedModel) -> ParameterReport:
    """Count the run's variant, and every other one that can adapt the same layers.

    Variants whose usual rank is the same get the run's rank, so that the rows compare like with
    like; the others keep their own.
    """
    shapes = wrapped.match.shapes
    configs = [
        wrapped.config if name == wrapped.config.variant else _comparable(name, wrapped.config)
        for name in variant_names()
    ]
    fitting = [c for c in configs if not any(c.check_layer(shape) for shape in shapes)]
    return count_variants(
        architecture, shapes, fitting, modules_to_save=list(wrapped.saved_modules)
    )


def _comparable(name: str, config: AdapterConfig) -> AdapterConfig:
    cls = config_class(name)
    usual = cls()
    if usual.rank != type(config)().rank:
        return usual
    return cls(rank=config.rank, rank_pattern=dict(config.rank_pattern))
