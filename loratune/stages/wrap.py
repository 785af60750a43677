"""Put a fresh or a saved adapter into a loaded base model."""

from __future__ import annotations

from torch import nn

from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.peft_format import AdapterFolder
from loratune.config.schema import RunConfig
from loratune.models.probes.layers import unusable_layers
from loratune.surgery import WrappedModel, wrap_model


def wrap(model: nn.Module, config: RunConfig, saved: AdapterFolder | None = None) -> WrappedModel:
    """Freeze the model and put the recipe's adapter on its targets, or the saved one on its own.

    Raises:
        LoratuneError: if a target matches nothing or cannot be adapted, or the saved adapter does
            not fit the model.
    """
    if saved is not None:
        return wrap_for_loading(model, saved)
    unusable = unusable_layers(model)
    seed = config.trainer.seed
    return wrap_model(model, config.adapter, config.targets, seed=seed, unusable=unusable)
