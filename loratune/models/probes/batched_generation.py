"""Whether a model answers from its cache, and several prompts at once, as one prompt without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from loratune.models.positions import positions
from loratune.models.probes.shortened import FAILURES, shortened
from loratune.models.probes.states import TOLERANCE, ids_of
from loratune.models.prompt_cache import batch_inputs, encoded_prefix

_NEW_TOKENS = 3
_PROMPT = 8
"""Tokens of a short prompt."""


@dataclass(frozen=True)
class BatchedGeneration:
    """What a model makes of several prompts in one batch.

    Attributes:
        padded: whether a prompt that is filled up on the left is answered as it is alone.
        prefixed: whether prompts behind a common prefix that was encoded once are.
        cached: whether the model goes on from what it keeps of earlier tokens as it does from the
            tokens themselves.
    """

    padded: bool
    prefixed: bool
    cached: bool = True


_RESULTS: WeakKeyDictionary[nn.Module, dict[int, BatchedGeneration]] = WeakKeyDictionary()
"""Of each model, by ``longest``."""
_CACHED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def probe_batched_generation(
    model: nn.Module, longest: int, tokens: Sequence[int]
) -> BatchedGeneration:
    """Generate for two prompts alone, in one batch, and in one behind their common prefix.

    Run on a copy with one block of each kind, in fp32; once for a model and a length.

    Args:
        model: a transformers model in evaluation mode; stays as it is.
        longest: tokens of the longest prompt with its answer.
        tokens: ids to draw the prompts from.
    """
    known = _RESULTS.setdefault(model, {})
    if longest not in known:
        known[longest] = _probe(model, longest, tokens)
    return known[longest]


def probe_cache(model: nn.Module) -> bool:
    """Whether a model goes on from what it keeps of a prompt as it does from the prompt itself.

    Run on a copy with one block of each kind, in fp32, for one short prompt; once for a model.  A
    model that computes nothing without its cache is taken to go on from it.

    Args:
        model: a transformers model in evaluation mode; stays as it is.
    """
    if model not in _CACHED:
        _CACHED[model] = _goes_on(model)
    return _CACHED[model]


@torch.no_grad()
def _goes_on(model: nn.Module) -> bool:
    small: Any = shortened(model)
    pool, draw = ids_of(small, ()), torch.Generator().manual_seed(0)
    prompt = pool[torch.randint(len(pool), (_PROMPT,), generator=draw)].tolist()
    inputs = batch_inputs([prompt], 0, next(small.parameters()).device)
    try:
        expected = _logits(small, inputs, cached=False)
    except FAILURES:
        return True
    return _agrees(partial(_logits, small, inputs, cached=True), expected)


@torch.no_grad()
def _probe(model: nn.Module, longest: int, tokens: Sequence[int]) -> BatchedGeneration:
    small: Any = shortened(model)
    room = (positions(model) or longest + _NEW_TOKENS) - _NEW_TOKENS
    whole = max(_PROMPT, min(longest, room))
    pool = ids_of(small, tokens)
    draw = torch.Generator().manual_seed(0)
    ids = pool[torch.randint(len(pool), (whole + 1,), generator=draw)].tolist()
    common = whole // 2
    # The second is short, so that it has a large gap, and what it sees lies across the gap.
    prompts = [ids[:whole], [*ids[:common], ids[whole]]]
    device = next(small.parameters()).device

    def alone(*, cached: bool) -> Tensor:
        inputs = (batch_inputs([prompt], 0, device) for prompt in prompts)
        return torch.cat([_logits(small, one, cached=cached) for one in inputs])

    def together(prefix: int, *, cached: bool) -> Tensor:
        cache = encoded_prefix(small, ids[:prefix]) if prefix else None
        return _logits(small, batch_inputs(prompts, 0, device, cache), cached=cached)

    try:
        expected = alone(cached=False)
    except FAILURES:  # it may need its cache
        return BatchedGeneration(padded=False, prefixed=False)
    cached = _agrees(partial(alone, cached=True), expected)
    return BatchedGeneration(
        padded=_agrees(partial(together, 0, cached=cached), expected),
        prefixed=cached and _agrees(partial(together, common, cached=True), expected),
        cached=cached,
    )


def _agrees(compute: Callable[[], Tensor], expected: Tensor) -> bool:
    try:
        found = compute()
    except FAILURES:
        return False
    return float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def _logits(model: Any, inputs: dict[str, Any], *, cached: bool) -> Tensor:
    """The logits (prompts, new tokens, vocabulary) behind each prompt."""
    output = model.generate(
        **inputs,
        use_cache=cached,
        do_sample=False,
        max_new_tokens=_NEW_TOKENS,
        min_new_tokens=_NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits, dim=1).float()
