"""Several rows in one sequence: the model's own attention masks, kept within each token's row.

A model that transformers gives its masks asks one function per attention implementation for them,
and describes each mask as a rule about two positions: causal, a sliding window, a chunk.  Here the
rule is applied to a token's place in its own row instead of its place in the sequence, and what
lies on no path to the token is hidden.  So every mask that the model uses stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

_MASKED = ("sdpa", "eager")
"""Attention implementations that take a whole mask; others find rows by their positions."""


def attention_of(model: nn.Module) -> str:
    """Name of the attention implementation a transformers model runs."""
    return str(getattr(getattr(model, "config", None), "_attn_implementation", "eager"))


@contextmanager
def rows_apart(model: nn.Module, positions: Tensor, ends: Tensor) -> Iterator[dict[str, Tensor]]:
    """Within the block a token sees the earlier tokens of its own row and nothing else.

    Args:
        model: a transformers model.
        positions: (B, T) position of each token in its row.
        ends: (B, T) for each token the end of the tokens behind it that see it.

    Yields:
        What the model's forward needs besides the ids.
    """
    inputs = {"position_ids": positions}
    if attention_of(model) not in _MASKED:
        yield inputs
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as interfaces

    with ExitStack() as restore:
        for name in _MASKED:
            interface = _on_paths(interfaces[name], positions, ends)
            interfaces[name] = interface
            restore.callback(interfaces.__delitem__, name)
        # All ones: without a mask, transformers would look for rows in the positions itself.
        yield {**inputs, "attention_mask": positions.new_ones(positions.shape)}


def _on_paths(interface: Callable[..., Any], positions: Tensor, ends: Tensor) -> Callable[..., Any]:
    """The interface that makes masks, with each rule applied to rows instead of sequences."""

    def make_mask(*, mask_function: Callable[..., Any], **options: Any) -> Any:
        def on_path(batch: Any, head: Any, query: Any, key: Any) -> Any:
            places = positions[batch, query], positions[batch, key]
            on_one_path = (key <= query) & (query < ends[batch, key])
            return mask_function(batch, head, *places) & on_one_path

        # Nothing is padded as far as the model knows, and no mask is plainly causal.
        return interface(
            **{**options, "attention_mask": None, "allow_is_causal_skip": False},
            mask_function=on_path,
        )

    return make_mask
