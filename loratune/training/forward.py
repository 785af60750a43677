"""A batch through the model: the inputs it needs, and no mask where causality is enough."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loratune.data.collate import PADDING, Batch
from loratune.loss.causal_model import LanguageModelHead
from loratune.loss.supervised import TokenLoss


def batch_loss(head: LanguageModelHead, batch: Batch, *, count_correct: bool = False) -> TokenLoss:
    """Summed loss of a batch's supervised tokens.

    Rows are padded on the right, so that causal attention never looks at padding: no mask is
    needed, and attention runs at its fastest.  A packed batch gets a block-diagonal mask and
    positions that restart with every row.
    """
    loss: TokenLoss = head(
        batch.input_ids,
        batch.labels,
        count_correct=count_correct,
        keep_each=batch.sources is not None,
        **_inputs(head.model, batch),
    )
    return loss


def source_sums(loss: TokenLoss, batch: Batch) -> Tensor:
    """Summed loss of every source's tokens in a batch of a mixture: (sources), double precision.

    Sums over a mask, not scattered additions: on CUDA those come in any order, and a repetition
    of the run would write other bytes.
    """
    assert batch.sources is not None and loss.each is not None and loss.rows is not None
    own = batch.sources.reshape(-1).index_select(0, loss.rows)
    numbers = torch.arange(len(batch.source_tokens), device=own.device)
    return torch.where(own == numbers[:, None], loss.each.double(), 0.0).sum(dim=1)


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    if batch.segment_ids is None:
        return {}
    inputs: dict[str, Any] = {"position_ids": batch.position_ids}
    if attention_of(model) != "flash_attention_2":  # which finds the rows by their positions
        dtype = next(model.parameters()).dtype
        inputs["attention_mask"] = block_diagonal_mask(batch.segment_ids, dtype)
    return inputs


def checkpoint_activations(model: Any) -> None:
    """Recompute every block's activations in the backward pass instead of keeping them.

    The non-reentrant form: it needs no input that requires a gradient, so adapters in the first
    block get theirs.
    """
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.2x
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def attention_of(model: nn.Module) -> str:
    """Name of the attention implementation a transformers model runs."""
    return str(getattr(getattr(model, "config", None), "_attn_implementation", "eager"))


def block_diagonal_mask(segment_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, T, T): 0 where a token may look, the dtype's least number elsewhere.

    A token sees itself and earlier tokens of its own row; padding sees itself, so that no line
    of the softmax is empty.
    """
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    real = segment_ids != PADDING
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=segment_ids.device)
    visible = (same & real[:, :, None] & causal) | itself
    mask = torch.zeros(visible.shape, dtype=dtype, device=segment_ids.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]
