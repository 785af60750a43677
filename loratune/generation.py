"""Answers by generation: greedy or sampled, stopping at the end token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loratune.data.batches import evaluation_batches
from loratune.data.tokenizing import Tokenizer
from loratune.errors import DataError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; ``temperature`` 0 is greedy."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 16
    seed: int = 0


@torch.inference_mode()
def generate_answers(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[list[int]], sampling: Sampling, pad_id: int
) -> list[str]:
    """The text that the model writes after each prompt, up to its end token.

    Args:
        model: a causal language model in eval mode.
        tokenizer: decodes the answer.
        prompts: token ids, start token included.
        sampling: how tokens are chosen.
        pad_id: fills short prompts on the left; masked, so any id will do.
    """
    answers = [""] * len(prompts)
    torch.manual_seed(sampling.seed)
    for places, ids in _generated(model, tokenizer, prompts, sampling, pad_id):
        for place, row in zip(places, ids, strict=True):
            answers[place] = tokenizer.decode(row, skip_special_tokens=True)
    return answers


def _generated(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[list[int]], sampling: Sampling, pad_id: int
) -> Iterator[tuple[list[int], list[list[int]]]]:
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    for places in evaluation_batches(lengths, sampling.batch_size):
        width = max(lengths[place] for place in places)
        room = _room(model, width, sampling.max_new_tokens)
        options = _options(tokenizer, sampling, pad_id, room)
        ids = [[pad_id] * (width - lengths[p]) + list(prompts[p]) for p in places]
        mask = [[0] * (width - lengths[p]) + [1] * lengths[p] for p in places]
        written = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            **options,
        )
        yield places, [_until_end(row, tokenizer) for row in written[:, width:].tolist()]


def _room(model: Any, width: int, wanted: int) -> int:
    """New tokens that fit behind prompts of ``width`` tokens: models know only so many positions.

    Raises:
        DataError: if the prompt alone fills them.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    room = wanted if positions is None else min(wanted, positions - width)
    if room < 1:
        raise DataError(
            f"a prompt of {width} tokens leaves no room for an answer",
            where=f"the model has {positions} positions",
            fix="shorten the prompt",
        )
    return room


def _options(tokenizer: Tokenizer, sampling: Sampling, pad_id: int, room: int) -> dict[str, Any]:
    from transformers import GenerationConfig

    sampled = sampling.temperature > 0
    config = GenerationConfig(
        max_new_tokens=room,
        do_sample=sampled,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_id,
        bos_token_id=tokenizer.bos_token_id,
        **({"temperature": sampling.temperature, "top_p": sampling.top_p} if sampled else {}),
    )
    return {"generation_config": config}


def _until_end(row: list[int], tokenizer: Tokenizer) -> list[int]:
    end = tokenizer.eos_token_id
    return row[: row.index(end)] if end in row else row
