"""Answers by generation: greedy or sampled, stopping at every token that ends an answer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loratune.data.batches import evaluation_batches
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import Tokenizer
from loratune.data.turn_ends import turn_ends
from loratune.errors import DataError
from loratune.models.positions import learned_positions


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; ``temperature`` 0 is greedy."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 16
    seed: int = 0


def stop_ids(model: Any, tokenizer: Tokenizer, prompt_format: PromptFormat | None) -> list[int]:
    """Every id that ends an answer, ascending.

    What the model's ``config.json``, its generation settings and its tokenizer name, and what
    closes a turn in the chat template of training.
    """
    named = [
        model.config.get_text_config().eos_token_id,
        model.config.eos_token_id,
        model.generation_config.eos_token_id,
        tokenizer.eos_token_id,
    ]
    if prompt_format is not None and prompt_format.chat_template is not None:
        named.append(turn_ends(tokenizer, prompt_format.chat_template))
    lists = [ids if isinstance(ids, list) else [ids] for ids in named]
    return sorted({int(end) for ids in lists for end in ids if end is not None})


def answer_text(tokenizer: Tokenizer, ids: Sequence[int], stops: Collection[int]) -> str:
    """The text of an answer's ids before the first stop; special tokens in it are written out."""
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return tokenizer.decode(list(ids[:end]), skip_special_tokens=False)


@torch.inference_mode()
def generate_answers(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    pad_id: int,
    stops: Sequence[int] = (),
) -> list[str]:
    """The text that the model writes after each prompt, up to the first token that ends it.

    Args:
        model: a causal language model in eval mode.
        tokenizer: decodes the answer.
        prompts: token ids, start token included.
        sampling: how tokens are chosen.
        pad_id: fills short prompts on the left; masked, so any id will do.
        stops: what ends an answer; by default what model and tokenizer name.
    """
    stops = stops or stop_ids(model, tokenizer, None)
    answers = [""] * len(prompts)
    torch.manual_seed(sampling.seed)
    for places, ids in _generated(model, tokenizer, prompts, sampling, pad_id, stops):
        for place, row in zip(places, ids, strict=True):
            answers[place] = answer_text(tokenizer, row, stops)
    return answers


def _generated(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    pad_id: int,
    stops: Sequence[int],
) -> Iterator[tuple[list[int], list[list[int]]]]:
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    for places in evaluation_batches(lengths, sampling.batch_size):
        width = max(lengths[place] for place in places)
        room = _room(model, width, sampling.max_new_tokens)
        options = _options(tokenizer, sampling, pad_id, room, stops)
        ids = [[pad_id] * (width - lengths[p]) + list(prompts[p]) for p in places]
        mask = [[0] * (width - lengths[p]) + [1] * lengths[p] for p in places]
        written = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            **options,
        )
        yield places, written[:, width:].tolist()


def _room(model: Any, width: int, wanted: int) -> int:
    """New tokens that fit behind prompts of ``width`` tokens: models know only so many positions.

    Raises:
        DataError: if the prompt alone fills positions that the model has learned.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    room = wanted if positions is None else min(wanted, positions - width)
    if room < 1 and learned_positions(model) is None:
        return wanted  # rotary positions go on; training said that it goes beyond them
    if room < 1:
        raise DataError(
            f"a prompt of {width} tokens leaves no room for an answer",
            where=f"the model has {positions} positions",
            fix="shorten the prompt",
        )
    return room


def _options(
    tokenizer: Tokenizer, sampling: Sampling, pad_id: int, room: int, stops: Sequence[int]
) -> dict[str, Any]:
    from transformers import GenerationConfig

    sampled = sampling.temperature > 0
    config = GenerationConfig(
        max_new_tokens=room,
        do_sample=sampled,
        eos_token_id=list(stops),
        pad_token_id=pad_id,
        bos_token_id=tokenizer.bos_token_id,
        **({"temperature": sampling.temperature, "top_p": sampling.top_p} if sampled else {}),
    )
    return {"generation_config": config}
