"""What ``train`` checks on the loaded model, checked before any weight is read.

The model is built from its config with one block of each kind and random weights: whether later
tokens change earlier ones, or which layers reach the loss, does not depend on the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from loratune.config.schema import RunConfig
from loratune.data.arrangement import Arrangement, arrange, assumed_arrangement, check_single_rows
from loratune.errors import ConfigError
from loratune.models.architectures import Architecture
from loratune.models.build import outline
from loratune.models.probes.layers import unusable_layers
from loratune.plan.memory import vocabulary
from loratune.plan.workload import Rows
from loratune.training.forward import checkpoint_activations


@dataclass(frozen=True)
class CheckedModel:
    """What the model allows.

    Attributes:
        arrangement: how it takes the recipe's rows.
        notes: what is to be said about that.
        recomputes: whether gradient checkpointing works.
    """

    arrangement: Arrangement
    notes: tuple[str, ...]
    recomputes: bool


def check_model(config: RunConfig, architecture: Architecture, rows: Rows) -> CheckedModel:
    """Check what training relies on.

    Args:
        config: the recipe.
        architecture: the base model's.
        rows: the recipe's; without them, rows of ``data.max_length`` are assumed.

    Raises:
        LoratuneError: where ``train`` would refuse the model.
    """
    model = outline(architecture.numbers)
    unusable_layers(model)
    if rows.data is None:
        check_single_rows(config, model, config.data.max_length, range(vocabulary(architecture)))
        arrangement, notes = assumed_arrangement(config), list[str]()
    else:
        data = rows.data
        arrangement, notes = arrange(config, model, data.pad_id, data.train, data.eval)
    try:
        checkpoint_activations(model)
        recomputes = True
    except ConfigError:
        if config.trainer.gradient_checkpointing:
            raise
        recomputes = False
    return CheckedModel(arrangement, tuple(notes), recomputes)
