"""Measure base and adapted model side by side."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from loratune.config.schema import EvaluateConfig
from loratune.data.arrangement import Arrangement
from loratune.data.batches import shard
from loratune.data.encoded_rows import EncodedRow
from loratune.data.prepare import GenerationPrompt, PreparedData
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import Tokenizer
from loratune.generation import Sampling, answer_text, generate_answers, stop_ids
from loratune.loss.causal_model import LanguageModelHead
from loratune.runs import processes
from loratune.surgery import WrappedModel, disabled
from loratune.training.forward import batch_loss, source_sums

COMPARED = "answer and reference, each from its tokens up to the first stop token, stripped"
"""What ``exact_match`` compares; special tokens are written out on both sides."""


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
        source_losses: mixtures only: name of every source to the mean loss of its own rows.
    """

    loss: float
    perplexity: float
    token_accuracy: float
    exact_match: float | None
    tokens: int
    prompts: int
    source_losses: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Base and adapted model on the same rows.

    Attributes:
        rows: evaluation rows.
        adapted: scores with the adapter.
        base: scores without it.
        samples: prompts with what was generated.
        stop_tokens: the tokens that end a generated answer.
        compared: what ``exact_match`` compares.
    """

    rows: int
    adapted: Metrics
    base: Metrics | None
    samples: list[Sample] = field(default_factory=list)
    stop_tokens: list[str] = field(default_factory=list)
    compared: str = COMPARED

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ``evaluation.json``."""
        return asdict(self)


class MeanScores(NamedTuple):
    """Scores over all supervised tokens, and the mean loss of every source of a mixture."""

    loss: float
    token_accuracy: float
    tokens: int
    source_losses: dict[str, float]


@torch.inference_mode()
def summed_scores(
    head: LanguageModelHead,
    rows: Sequence[EncodedRow],
    batches: Iterable[Sequence[int]],
    arrangement: Arrangement,
    sources: Sequence[str] = (),
) -> tuple[float, ...]:
    """Summed loss, tokens ranked first and supervised tokens of rows, batch by batch.

    Then the summed loss of every source's rows.

    Args:
        head: the model in eval mode.
        rows: encoded rows.
        batches: row numbers of each batch.
        arrangement: how the rows of a batch lie in its sequences.
        sources: names of the rows' sources.
    """
    device = next(head.model.parameters()).device
    loss = correct = tokens = 0.0
    own = torch.zeros(len(sources), dtype=torch.float64, device=device)
    for numbers in filter(None, batches):
        chosen = [rows[number] for number in numbers]
        batch = arrangement.batch(chosen, sources=sources).to(device)
        scores = batch_loss(head, batch, count_correct=True)
        assert scores.correct is not None
        loss, correct = loss + float(scores.total), correct + float(scores.correct)
        tokens += scores.tokens
        if sources:
            own += source_sums(scores, batch)
    return loss, correct, tokens, *own.tolist()


def evaluation_scores(
    head: LanguageModelHead,
    rows: Sequence[EncodedRow],
    arrangement: Arrangement,
    batch_size: int,
) -> MeanScores:
    """Mean loss, token accuracy and number of supervised tokens, over all processes."""
    rank, world = processes.rank(), processes.world_size()
    batches = arrangement.evaluation_batches(rows, batch_size)
    supervised = Counter[str]()
    for row in rows:
        supervised[row.origin] += row.supervised
    names = list(filter(None, supervised))
    shares = (shard(numbers, rank, world) for numbers in batches)
    sums = summed_scores(head, rows, shares, arrangement, names)
    device = next(head.model.parameters()).device
    loss, correct, tokens, *own = processes.total(sums, device)
    parts = {name: part / supervised[name] for name, part in zip(names, own, strict=True)}
    return MeanScores(loss / tokens, correct / tokens, int(tokens), parts)


def evaluation_loss(
    head: LanguageModelHead,
    rows: Sequence[EncodedRow],
    arrangement: Arrangement,
    batch_size: int,
) -> tuple[float, float, int]:
    """The same without the sources' own losses."""
    return evaluation_scores(head, rows, arrangement, batch_size)[:3]


def answer_prompts(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[GenerationPrompt],
    config: EvaluateConfig,
    pad_id: int,
    prompt_format: PromptFormat | None,
) -> tuple[list[str], list[float]]:
    """The greedy answer to each prompt, and 1 where it is one of the references, else 0.

    Both are decoded from ids in the same way: see ``COMPARED``.
    """
    chosen = prompts[: config.generate_limit] if config.generate else []
    if not chosen:
        return [], []
    sampling = Sampling(config.max_new_tokens, batch_size=config.batch_size)
    ids = [prompt.prompt_ids for prompt in chosen]
    stops = stop_ids(model, tokenizer, prompt_format)
    answers = generate_answers(model, tokenizer, ids, sampling, pad_id, stops)
    exact = [
        float(answer.strip() in references(prompt, tokenizer, stops))
        for answer, prompt in zip(answers, chosen, strict=True)
    ]
    return answers, exact


def references(
    prompt: GenerationPrompt, tokenizer: Tokenizer, stops: Sequence[int]
) -> tuple[str, ...]:
    """The right answers as their tokens spell them; as the row has them where it was cut short."""
    decoded = [answer_text(tokenizer, ids, stops).strip() for ids in prompt.answer_ids]
    return tuple(decoded) or prompt.references


def evaluate(
    wrapped: WrappedModel,
    head: LanguageModelHead,
    tokenizer: Tokenizer,
    data: PreparedData,
    arrangement: Arrangement,
    config: EvaluateConfig,
) -> Evaluation:
    """Loss, perplexity, token accuracy and exact match, with the adapter and without it.

    Args:
        wrapped: the model, in eval mode.
        head: its loss head.
        tokenizer: decodes answers.
        data: has evaluation rows, and prompts where the format has them.
        arrangement: how rows lie in the sequences of a batch.
        config: what to measure.
    """
    adapted, answers = _measure(head, tokenizer, data, arrangement, config)
    base, base_answers = None, [""] * len(answers)
    if config.base:
        with disabled(wrapped):
            base, base_answers = _measure(head, tokenizer, data, arrangement, config)
    stops = stop_ids(head.model, tokenizer, data.answer_format) if answers else []
    samples = [
        Sample(
            tokenizer.decode(p.prompt_ids, skip_special_tokens=True),
            references(p, tokenizer, stops)[0],
            before,
            after,
        )
        for p, before, after in zip(data.prompts, base_answers, answers, strict=False)
    ]
    names = tokenizer.convert_ids_to_tokens(stops)
    return Evaluation(len(data.eval), adapted, base, samples, names)


def _measure(
    head: LanguageModelHead,
    tokenizer: Tokenizer,
    data: PreparedData,
    arrangement: Arrangement,
    config: EvaluateConfig,
) -> tuple[Metrics, list[str]]:
    scores = evaluation_scores(head, data.eval, arrangement, config.batch_size)
    answers, exact = answer_prompts(
        head.model, tokenizer, data.prompts, config, data.pad_id, data.answer_format
    )
    metrics = Metrics(
        loss=scores.loss,
        perplexity=math.exp(min(scores.loss, 700.0)),
        token_accuracy=scores.token_accuracy,
        exact_match=sum(exact) / len(exact) if exact else None,
        tokens=scores.tokens,
        prompts=len(answers),
        source_losses=scores.source_losses,
    )
    return metrics, answers
