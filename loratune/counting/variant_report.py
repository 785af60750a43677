"""The parameter report of a run: its own variant as it is, the others beside it."""

from __future__ import annotations

from loratune.counting.parameters import ParameterReport, count_variants
from loratune.counting.variant_table import variant_configs
from loratune.models.architectures import Architecture
from loratune.surgery import WrappedModel


def report_variants(architecture: Architecture, wrapped: WrappedModel) -> ParameterReport:
    """Count the run's variant, and every other one that can adapt the same layers.

    The ranks are those of ``count-params`` (see ``variant_configs``).
    """
    shapes = wrapped.match.shapes
    fitting = [
        config
        for config in variant_configs(wrapped.config)
        if not any(config.check_layer(shape) for shape in shapes)
    ]
    return count_variants(
        architecture, shapes, fitting, modules_to_save=list(wrapped.saved_modules)
    )
