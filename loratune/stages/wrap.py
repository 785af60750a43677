"""Put a fresh or a saved adapter into a loaded base model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.peft_format import AdapterFolder
from loratune.config.schema import RunConfig, trained_tokens
from loratune.models.probes.layers import unusable_layers
from loratune.models.unread import UnreadParameters
from loratune.models.vocabulary import token_ids
from loratune.surgery import WrappedModel, wrap_model


def wrap(
    model: nn.Module,
    config: RunConfig,
    saved: AdapterFolder | None = None,
    tokenizer: Any = None,
    read_original: Callable[[str], Tensor] | None = None,
    unread: UnreadParameters | None = None,
) -> WrappedModel:
    """Freeze the model and put the recipe's adapter on its targets, or the saved one on its own.

    Args:
        model: the base.
        config: the recipe.
        saved: the adapter to put in.
        tokenizer: gives the ids of the tokens that a new adapter trains.
        read_original: gives a parameter as it was before a layer was quantized.
        unread: gives the values of a base whose parameters have no data yet.

    Raises:
        LoratuneError: if a target matches nothing or cannot be adapted, or the saved adapter does
            not fit the model.
    """
    if saved is not None:
        return wrap_for_loading(model, saved, unread.named if unread else None, unread)
    tokens = trained_tokens(config)
    ids = token_ids(tokenizer, tokens) if tokens else []
    return wrap_model(
        model,
        config.adapter,
        config.targets,
        seed=config.trainer.seed,
        unusable=unusable_layers(model),
        tokens=ids,
        read_original=read_original,
        read=unread.read if unread else None,
        copy=unread.trained_copy if unread else None,
    )
