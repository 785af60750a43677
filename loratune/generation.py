"""Answers by generation: greedy or sampled, stopping at every token that ends an answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune.data.batches import evaluation_batches
from loratune.data.prefix_tree import common_length
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import Tokenizer
from loratune.data.turn_ends import turn_ends
from loratune.errors import DataError
from loratune.models.build import read_generation_config, read_transformers_config
from loratune.models.positions import learned_positions, positions
from loratune.models.probes.batched_generation import (
    BatchedGeneration,
    probe_batched_generation,
    probe_cache,
)
from loratune.models.prompt_cache import EncodedPrefix, batch_inputs, encoded_prefix

WORTH_SHARING = 16
"""Tokens that prompts must begin with in common for these to be encoded once."""


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
    return sorted(_ends(model.config, model.generation_config, tokenizer, prompt_format))


def folder_stop_ids(
    folder: Path, tokenizer: Tokenizer, prompt_format: PromptFormat | None
) -> list[int]:
    """The same from a model folder alone, the tokenizer's end token first.

    Raises:
        ModelError: if its generation_config.json is broken.
    """
    config = read_transformers_config(folder)
    ends = _ends(config, read_generation_config(folder), tokenizer, prompt_format)
    return sorted(ends, key=lambda end: (end != tokenizer.eos_token_id, end))


def _ends(
    config: Any, generation: Any, tokenizer: Tokenizer, prompt_format: PromptFormat | None
) -> set[int]:
    named = [
        getattr(config.get_text_config(), "eos_token_id", None),
        getattr(config, "eos_token_id", None),
        generation.eos_token_id,
        tokenizer.eos_token_id,
    ]
    if prompt_format is not None and prompt_format.chat_template is not None:
        named.append(turn_ends(tokenizer, prompt_format.chat_template))
    lists = [ids if isinstance(ids, list) else [ids] for ids in named]
    return {int(end) for ids in lists for end in ids if end is not None}


def answer_text(tokenizer: Tokenizer, ids: Sequence[int], stops: Collection[int]) -> str:
    """The text of an answer's ids before the first stop; special tokens in it are written out."""
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return tokenizer.decode(list(ids[:end]), skip_special_tokens=False)


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
    answers = generate_ids(model, tokenizer, prompts, sampling, pad_id, stops)
    return [answer_text(tokenizer, ids, stops) for ids in answers]


@torch.inference_mode()
def generate_ids(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    pad_id: int,
    stops: Sequence[int],
) -> list[list[int]]:
    """The same as token ids, the one that ends an answer included."""
    answers: list[list[int]] = [[]] * len(prompts)
    torch.manual_seed(sampling.seed)
    for places, rows in _generated(model, tokenizer, prompts, sampling, pad_id, stops):
        for place, ids in zip(places, rows, strict=True):
            end = next((n for n, token in enumerate(ids, start=1) if token in stops), len(ids))
            answers[place] = ids[:end]
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
    together = _together(model, prompts, sampling.max_new_tokens)
    prefix: EncodedPrefix | None = None
    for places in _batches(prompts, sampling.batch_size, together):
        batch = [prompts[place] for place in places]
        width = max(map(len, batch))
        room = _room(model, width, sampling.max_new_tokens)
        options = _options(tokenizer, sampling, pad_id, room, stops, cached=together.cached)
        if together.prefixed:
            prefix = _prefix(model, batch, prefix)
        inputs = batch_inputs(batch, pad_id, device, prefix)
        written: Tensor = model.generate(**inputs, **options)
        yield places, written[:, width:].tolist()


def _together(model: Any, prompts: Sequence[list[int]], new_tokens: int) -> BatchedGeneration:
    """How prompts can be answered together."""
    if len(prompts) < 2:
        return BatchedGeneration(padded=False, prefixed=False, cached=probe_cache(model))
    tokens = sorted({token for prompt in prompts for token in prompt})
    return probe_batched_generation(model, max(map(len, prompts)) + new_tokens, tokens)


def _batches(
    prompts: Sequence[list[int]], size: int, together: BatchedGeneration
) -> list[list[int]]:
    """Places of the prompts in batches: of one length each where padding is not exact."""
    lengths = [len(prompt) for prompt in prompts]
    if not together.padded:
        alike: dict[int, list[int]] = {}
        for place, length in enumerate(lengths):
            alike.setdefault(length, []).append(place)
        return [group[n : n + size] for group in alike.values() for n in range(0, len(group), size)]
    by_length = evaluation_batches(lengths, size)
    if not together.prefixed:
        return by_length
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    by_prefix = [order[n : n + size] for n in range(0, len(order), size)]

    def computed(batches: list[list[int]]) -> int:
        shared = [(len(b), common_prefix([prompts[n] for n in b])) for b in batches]
        widths = [max(lengths[n] for n in b) for b in batches]
        pairs = zip(shared, widths, strict=True)
        return sum(common + count * (width - common) for (count, common), width in pairs)

    return min(by_length, by_prefix, key=computed)


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """Tokens that all prompts begin with, short of the last one of each; 0 where few."""
    common = min(common_length(min(prompts), max(prompts)), min(map(len, prompts)) - 1)
    return common if len(prompts) > 1 and common >= WORTH_SHARING else 0


def _prefix(
    model: Any, batch: Sequence[list[int]], before: EncodedPrefix | None
) -> EncodedPrefix | None:
    """What the batch's prompts begin with, encoded; the last batch's where it is that."""
    common = common_prefix(batch)
    if not common:
        return None
    known = before.ids if before else []
    fits = len(known) <= common < len(known) + WORTH_SHARING
    if before and fits and batch[0][: len(known)] == known:
        return before
    return encoded_prefix(model, batch[0][:common])


def _room(model: Any, width: int, wanted: int) -> int:
    """New tokens that fit behind prompts of ``width`` tokens: models know only so many positions.

    Raises:
        DataError: if the prompt alone fills positions that the model has learned.
    """
    most = positions(model)
    room = wanted if most is None else min(wanted, most - width)
    if room < 1 and learned_positions(model) is None:
        return wanted  # rotary positions go on; training said that it goes beyond them
    if room < 1:
        raise DataError(
            f"a prompt of {width} tokens leaves no room for an answer",
            where=f"the model has {most} positions",
            fix="shorten the prompt",
        )
    return room


def _options(
    tokenizer: Tokenizer,
    sampling: Sampling,
    pad_id: int,
    room: int,
    stops: Sequence[int],
    *,
    cached: bool,
) -> dict[str, Any]:
    from transformers import GenerationConfig

    sampled = sampling.temperature > 0
    config = GenerationConfig(
        max_new_tokens=room,
        do_sample=sampled,
        use_cache=cached,
        eos_token_id=list(stops),
        pad_token_id=pad_id,
        bos_token_id=tokenizer.bos_token_id,
        **({"temperature": sampling.temperature, "top_p": sampling.top_p} if sampled else {}),
    )
    return {"generation_config": config}


# -- one answer, as it is written ------------------------------------------------------------


@torch.inference_mode()
def stream_answer(
    model: Any,
    tokenizer: Tokenizer,
    prompt: list[int],
    sampling: Sampling,
    pad_id: int,
    stops: Sequence[int],
    show: Callable[[str], None],
) -> str:
    """Answer one prompt, and give every piece of text to ``show`` once it is certain.

    Args:
        model: a causal language model in eval mode.
        tokenizer: decodes the answer.
        prompt: token ids, start token included.
        sampling: how tokens are chosen.
        pad_id: any id.
        stops: what ends an answer.
        show: takes the pieces, in order.

    Returns:
        The whole answer.  Interrupted by Ctrl-C, as far as it was written.

    Raises:
        DataError: if the prompt leaves no room for an answer.
    """
    room = _room(model, len(prompt), sampling.max_new_tokens)
    options = _options(tokenizer, sampling, pad_id, room, stops, cached=probe_cache(model))
    written = _Written(tokenizer, stops, show)
    torch.manual_seed(sampling.seed)
    device = next(model.parameters()).device
    with contextlib.suppress(KeyboardInterrupt):
        model.generate(**batch_inputs([prompt], pad_id, device, None), **options, streamer=written)
    written.end()
    return written.text


class _Written:
    """The text of an answer that grows; transformers calls ``put`` and ``end``."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Collection[int], show: Callable[[str], None]
    ) -> None:
        self._tokenizer, self._stops, self._show = tokenizer, stops, show
        self._ids: list[int] | None = None
        self.text = ""

    def put(self, ids: Tensor) -> None:
        """The prompt first, then one token after another."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += ids.flatten().tolist()
        text = answer_text(self._tokenizer, self._ids, self._stops)
        if not text.endswith(_INCOMPLETE):
            self._add(text)

    def end(self) -> None:
        """Show what is left."""
        self._add(answer_text(self._tokenizer, self._ids or [], self._stops))

    def _add(self, text: str) -> None:
        new = text[len(self.text) :]
        self.text = text
        if new:
            self._show(new)


_INCOMPLETE = "\ufffd"
"""What the bytes of a character are decoded to before all of them are there."""
