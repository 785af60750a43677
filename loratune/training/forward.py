"""A batch through the model: the inputs it needs, and no mask where causality is enough."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loratune.data.collate import Batch
from loratune.errors import ConfigError
from loratune.loss.causal_model import LanguageModelHead
from loratune.loss.supervised import TokenLoss
from loratune.models.build import first_line
from loratune.models.row_masks import rows_apart


def batch_loss(head: LanguageModelHead, batch: Batch, *, count_correct: bool = False) -> TokenLoss:
    """Summed loss of a batch's supervised tokens.

    Single rows are padded on the right, so that causal attention never looks at padding: no mask
    is needed, and attention runs at its fastest.  Where sequences hold several rows, each token
    sees its own row alone.
    """
    loss: TokenLoss
    wanted: dict[str, Any] = {
        "count_correct": count_correct,
        "keep_each": batch.sources is not None,
    }
    if head.routers is not None:
        wanted["computed"] = batch.not_padding
    if batch.position_ids is None or batch.subtree_ends is None:
        loss = head(batch.input_ids, batch.targets, **wanted)
        return loss
    with rows_apart(head.model, batch.position_ids, batch.subtree_ends) as inputs:
        loss = head(batch.input_ids, batch.targets, **wanted, **inputs)
    return loss


def source_sums(loss: TokenLoss, batch: Batch) -> Tensor:
    """Summed loss of every source's tokens in a batch of a mixture: (sources), double precision.

    Sums over a mask, not scattered additions: on CUDA those come in any order, and a repetition
    of the run would write other bytes.
    """
    assert batch.sources is not None and loss.each is not None
    numbers = torch.arange(len(batch.source_tokens), device=loss.each.device)
    return torch.where(batch.sources == numbers[:, None], loss.each.double(), 0.0).sum(dim=1)


def checkpoint_activations(model: Any) -> None:
    """Recompute every block's activations in the backward pass instead of keeping them.

    The non-reentrant form: it needs no input that requires a gradient, so adapters in the first
    block get theirs, and an embedding's output stays what it is: some models add to it in place.

    Raises:
        ConfigError: for a model that cannot.
    """
    options = {"use_reentrant": False}
    try:
        if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.2x
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.disable_input_require_grads()
    except ValueError as error:
        raise ConfigError(
            f"this model cannot recompute its activations: {first_line(error)}",
            where="trainer.gradient_checkpointing=true",
            fix="set it to false, and trainer.batch_size lower if memory is short",
        ) from error
