"""Prompts as a batch for generation, behind a prefix whose keys and values are there already."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class EncodedPrefix:
    """A beginning that prompts share.

    Attributes:
        ids: its tokens.
        cache: what the model keeps of them, for one sequence.
    """

    ids: list[int]
    cache: Any


@torch.inference_mode()
def encoded_prefix(model: Any, ids: list[int]) -> EncodedPrefix:
    """Run a prefix through the model, once for all prompts behind it."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    device = next(model.parameters()).device
    model(
        input_ids=torch.tensor([ids], device=device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return EncodedPrefix(ids, cache)


def batch_inputs(
    prompts: Sequence[list[int]],
    pad_id: int,
    device: torch.device,
    prefix: EncodedPrefix | None = None,
) -> dict[str, Any]:
    """What ``generate`` takes: ids and mask (prompts, length), and the prefix's cache.

    Short prompts are filled up on the left, behind the prefix; what is filled up is masked.
    """
    shared = len(prefix.ids) if prefix else 0
    width = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        gap = width - len(prompt)
        ids.append([*prompt[:shared], *[pad_id] * gap, *prompt[shared:]])
        mask.append([*[1] * shared, *[0] * gap, *[1] * (len(prompt) - shared)])
    inputs = {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
    if prefix is None:
        return inputs
    cache = copy.deepcopy(prefix.cache)
    cache.batch_repeat_interleave(len(prompts))
    return {**inputs, "past_key_values": cache}
