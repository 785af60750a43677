"""Choose a run's golden prompts and record what the model makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from loratune.adapters.low_rank import LowRank
from loratune.data.prepare import GenerationPrompt, PreparedData
from loratune.data.tokenizing import RowTokenizer, Tokenizer
from loratune.runs.golden import ADAPTED, BASE, Golden, GoldenPrompt
from loratune.surgery import WrappedModel, disabled

PROMPTS = 8
STRENGTHS = (BASE, 0.25, 0.5, ADAPTED, 2.0, 4.0)
"""Usual mistakes about alpha, rank and its root lie near one of these."""
LIKELY = 16
"""Tokens recorded of each strength: its most likely ones."""
_Asked = tuple[GenerationPrompt, tuple[str, str], str]
"""A prompt, its answers by base and adapted model, and the prompt as text."""


def golden_prompts(
    wrapped: WrappedModel,
    tokenizer: Tokenizer,
    data: PreparedData,
    answers: Sequence[tuple[str, str]],
    max_new_tokens: int,
) -> Golden | None:
    """What base and adapted model make of a few evaluation prompts; ``None`` where there are none.

    Args:
        wrapped: the model, in eval mode.
        tokenizer: its tokenizer.
        data: the evaluation rows.
        answers: the base's and the adapted model's answers to ``data.prompts``, in order.
        max_new_tokens: longest answer among them.
    """
    writer = RowTokenizer(tokenizer)
    chosen = _chosen(writer, data.prompts, answers)
    if not chosen:
        return None
    scaled = all(isinstance(layer, LowRank) for layer in wrapped.adapters.values())
    strengths = STRENGTHS if scaled and not wrapped.saved_modules else (BASE, ADAPTED)
    prompts = [_recorded(wrapped, writer, strengths, *one) for one in chosen]
    chat = data.answer_format.chat_template is not None
    return Golden(list(strengths), max_new_tokens, chat, prompts)


def _chosen(
    writer: RowTokenizer, prompts: Sequence[GenerationPrompt], answers: Sequence[tuple[str, str]]
) -> list[_Asked]:
    """Prompts that can be sent as text, spread over the rows; first those that tell the models."""
    asked = []
    for prompt, answered in zip(prompts, answers, strict=False):
        text = _text(writer, prompt.prompt_ids)
        if text is not None:
            asked.append((prompt, answered, text))
    telling = [one for one in asked if one[1][0] != one[1][1]]
    rest = [one for one in asked if one[1][0] == one[1][1]]
    spread = _spread(telling, PROMPTS)
    return [*spread, *_spread(rest, PROMPTS - len(spread))]


def _spread(items: Sequence[_Asked], count: int) -> list[_Asked]:
    step = max(1, len(items) // count) if count else 1
    return list(items[::step][:count])


def _text(writer: RowTokenizer, ids: list[int]) -> str | None:
    """A prompt as text that a server tokenizes to the same ids, or ``None``."""
    own = ids[len(writer.start_ids) :] if ids[: len(writer.start_ids)] == writer.start_ids else ids
    text = writer.tokenizer.decode(own, skip_special_tokens=False)
    return text if text and writer.opening_ids([text])[0] == ids else None


def _recorded(
    wrapped: WrappedModel,
    writer: RowTokenizer,
    strengths: Sequence[float],
    prompt: GenerationPrompt,
    answered: tuple[str, str],
    text: str,
) -> GoldenPrompt:
    rows = torch.stack([_first(wrapped, prompt.prompt_ids, strength) for strength in strengths])
    base, adapted = answered
    likely = sorted(set(rows.topk(min(LIKELY, rows.shape[1]), dim=1).indices.flatten().tolist()))
    first = {writer.tokenizer.decode([token]): rows[:, token].tolist() for token in likely}
    return GoldenPrompt(
        text,
        [dict(turn) for turn in prompt.messages],
        len(prompt.prompt_ids),
        adapted,
        base or None,
        first,
    )


@torch.inference_mode()
def _first(wrapped: WrappedModel, ids: list[int], strength: float) -> Tensor:
    """Log-probabilities of the first token of an answer, (vocabulary,) in fp32 on the CPU."""
    device = next(wrapped.model.parameters()).device
    with _at_strength(wrapped, strength):
        logits: Tensor = wrapped.model(torch.tensor([ids], device=device)).logits[0, -1]
    return logits.float().log_softmax(-1).cpu()


@contextmanager
def _at_strength(wrapped: WrappedModel, strength: float) -> Iterator[None]:
    """Inside the block every correction is ``strength`` times its own."""
    if strength == BASE:
        with disabled(wrapped):
            yield
        return
    before = {name: layer.scaling for name, layer in wrapped.adapters.items()}
    for layer in wrapped.adapters.values():
        layer.scaling *= strength
    try:
        yield
    finally:
        for name, layer in wrapped.adapters.items():
            layer.scaling = before[name]
