"""Measure base and adapted model side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from loratune.config.schema import EvaluateConfig
from loratune.data.batches import evaluation_batches, shard
from loratune.data.collate import collate
from loratune.data.encoded_rows import EncodedRow
from loratune.data.prepare import GenerationPrompt, PreparedData
from loratune.generation import Sampling, generate_answers
from loratune.loss import LanguageModelHead
from loratune.runs import processes
from loratune.surgery import WrappedModel, disabled
from loratune.training.forward import batch_loss


@dataclass(frozen=True)
class Sample:
    """One prompt with its reference and what was generated, for a person to read."""

    prompt: str
    reference: str
    base: str
    adapted: str


@dataclass(frozen=True)
class Metrics:
    """What one model scored on the evaluation rows.

    Attributes:
        loss: mean over supervised tokens, in nats.
        perplexity: its exponential.
        token_accuracy: share of supervised tokens that were the most likely ones.
        exact_match: share of prompts answered exactly as one of their references.
        tokens: supervised tokens.
        prompts: prompts that were answered.
    """

    loss: float
    perplexity: float
    token_accuracy: float
    exact_match: float | None
    tokens: int
    prompts: int


@dataclass(frozen=True)
class Evaluation:
    """Base and adapted model on the same rows."""

    rows: int
    adapted: Metrics
    base: Metrics | None
    samples: list[Sample] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ``evaluation.json``."""
        return asdict(self)


@torch.inference_mode()
def evaluation_loss(
    head: LanguageModelHead, rows: Sequence[EncodedRow], pad_id: int, batch_size: int
) -> tuple[float, float, int]:
    """Mean loss, token accuracy and number of supervised tokens, over all processes."""
    device = next(head.model.parameters()).device
    loss_sum = correct = tokens = 0.0
    for places in evaluation_batches([len(row) for row in rows], batch_size):
        mine = shard(places, processes.rank(), processes.world_size())
        if mine:
            batch = collate([rows[place] for place in mine], pad_id).to(device)
            scores = batch_loss(head, batch, count_correct=True)
            assert scores.correct is not None
            loss_sum, correct = loss_sum + float(scores.total), correct + float(scores.correct)
            tokens += scores.tokens
    loss_sum, correct, tokens = processes.total([loss_sum, correct, tokens], device)
    return loss_sum / tokens, correct / tokens, int(tokens)


def evaluate(
    wrapped: WrappedModel,
    head: LanguageModelHead,
    tokenizer: Any,
    data: PreparedData,
    config: EvaluateConfig,
) -> Evaluation:
    """Loss, perplexity, token accuracy and exact match, with the adapter and without it.

    Args:
        wrapped: the model, in eval mode.
        head: its loss head.
        tokenizer: decodes answers.
        data: has evaluation rows, and prompts where the format has them.
        config: what to measure.
    """
    prompts = data.prompts[: config.generate_limit] if config.generate else []
    adapted, answers = _measure(wrapped, head, tokenizer, data, config, prompts)
    base, base_answers = None, [""] * len(prompts)
    if config.base:
        with disabled(wrapped):
            base, base_answers = _measure(wrapped, head, tokenizer, data, config, prompts)
    samples = [
        Sample(tokenizer.decode(p.prompt_ids, skip_special_tokens=True), p.answer, before, after)
        for p, before, after in zip(prompts, base_answers, answers, strict=True)
    ]
    return Evaluation(len(data.eval), adapted, base, samples)


def _measure(
    wrapped: WrappedModel,
    head: LanguageModelHead,
    tokenizer: Any,
    data: PreparedData,
    config: EvaluateConfig,
    prompts: Sequence[GenerationPrompt],
) -> tuple[Metrics, list[str]]:
    loss, accuracy, tokens = evaluation_loss(head, data.eval, data.pad_id, config.batch_size)
    sampling = Sampling(config.max_new_tokens, batch_size=config.batch_size)
    ids = [prompt.prompt_ids for prompt in prompts]
    answers = generate_answers(wrapped.model, tokenizer, ids, sampling, data.pad_id)
    exact = sum(
        answer.strip() in prompt.references for answer, prompt in zip(answers, prompts, strict=True)
    )
    metrics = Metrics(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        token_accuracy=accuracy,
        exact_match=exact / len(prompts) if prompts else None,
        tokens=tokens,
        prompts=len(prompts),
    )
    return metrics, answers
