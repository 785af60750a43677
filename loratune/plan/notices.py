"""What training says of a recipe beside its rows, found without a weight."""

from __future__ import annotations

from loratune.config.schema import RunConfig
from loratune.models.architectures import Architecture
from loratune.targets.find import TargetMatch, find_targets, targets_of


def match_targets(config: RunConfig, architecture: Architecture) -> TargetMatch:
    """The recipe's targets among the layers of its base.

    Raises:
        LoratuneError: as training does.
    """
    return find_targets(
        architecture.layers,
        targets_of(config.adapter, config.targets, architecture),
        config.adapter,
        family=architecture.family,
        others=architecture.other_types,
        stacked=architecture.stacked_experts,
        unusable=architecture.unusable,
        base_parameters=architecture.base_parameters,
    )
