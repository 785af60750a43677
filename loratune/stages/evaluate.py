"""Measure base and adapted model side by side."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loratune.config.schema import EvaluateConfig
from loratune.data.arrangement import Arrangement
from loratune.data.batches import shard
from loratune.data.encoded_rows import EncodedRow
from loratune.data.prepare import GenerationPrompt, PreparedData
from loratune.data.questions import units
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import Tokenizer
from loratune.generation import Sampling, answer_text, generate_answers, stop_ids
from loratune.loss.causal_model import LanguageModelHead
from loratune.runs import processes
from loratune.scoring.metric import TextMetric
from loratune.scoring.registry import EXACT_MATCH, text_metrics
from loratune.scoring.resampling import Gain, Score, TokenMean, estimated, gained
from loratune.surgery import WrappedModel, disabled
from loratune.training.forward import batch_loss, source_sums
from loratune.training.sharding import drop_gathered, is_sharded

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
        scores: the loss, and every metric of ``evaluate.metrics``, with its 95 % interval over
            prompts.
    """

    loss: float
    perplexity: float
    token_accuracy: float
    exact_match: float | None
    tokens: int
    prompts: int
    source_losses: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Base and adapted model on the same rows.

    Attributes:
        rows: evaluation rows.
        adapted: scores with the adapter.
        base: scores without it.
        gains: name of the loss and of every metric to adapted minus base, paired by prompt.
        samples: prompts with what was generated.
        stop_tokens: the tokens that end a generated answer.
        compared: what ``exact_match`` compares.
        retention: name of every file of ``evaluate.retention`` to the same on its rows.
    """

    rows: int
    adapted: Metrics
    base: Metrics | None
    gains: dict[str, Gain] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    stop_tokens: list[str] = field(default_factory=list)
    compared: str = COMPARED
    retention: dict[str, Evaluation] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ``evaluation.json``."""
        return asdict(self)


class MeanScores(NamedTuple):
    """Scores over all supervised tokens.

    ``source_losses`` is the mean loss of every source of a mixture, ``row_losses`` the summed loss
    of every row.
    """

    loss: float
    token_accuracy: float
    tokens: int
    source_losses: dict[str, float]
    row_losses: list[float]


class SummedScores(NamedTuple):
    """Summed loss, tokens ranked first and supervised tokens; (rows,) the loss of every row."""

    loss: float
    correct: float
    tokens: float
    row_losses: Tensor


@torch.inference_mode()
def summed_scores(
    head: LanguageModelHead,
    rows: Sequence[EncodedRow],
    batches: Iterable[Sequence[int]],
    arrangement: Arrangement,
    idle: Container[int] = (),
) -> SummedScores:
    """The scores of rows, batch by batch; rows of no batch have a loss of 0.

    Args:
        head: the model in eval mode.
        rows: encoded rows.
        batches: row numbers of each batch.
        arrangement: how the rows of a batch lie in its sequences.
        idle: places of batches that are computed and not counted.
    """
    device = next(head.model.parameters()).device
    loss = correct = tokens = 0.0
    row_losses = torch.zeros(len(rows), dtype=torch.float64, device=device)
    for place, numbers in enumerate(batches):
        if not numbers:
            continue
        names = [str(number) for number in numbers]  # every row is a source of its own
        chosen = [replace(rows[number], origin=str(number)) for number in numbers]
        batch = arrangement.batch(chosen, sources=names).to(device)
        scores = batch_loss(head, batch, count_correct=True)
        if place in idle:
            continue
        assert scores.correct is not None
        loss, correct = loss + float(scores.total), correct + float(scores.correct)
        tokens += scores.tokens
        row_losses[list(numbers)] = source_sums(scores, batch)
    return SummedScores(loss, correct, tokens, row_losses)


def evaluation_scores(
    head: LanguageModelHead,
    rows: Sequence[EncodedRow],
    arrangement: Arrangement,
    batch_size: int,
) -> MeanScores:
    """Mean loss, token accuracy and number of supervised tokens, over all processes."""
    rank, world = processes.rank(), processes.world_size()
    batches = arrangement.evaluation_batches(rows, batch_size)
    shares = [shard(numbers, rank, world) for numbers in batches]
    idle = [place for place, share in enumerate(shares) if not share]
    if is_sharded(head.model):  # its weights are gathered by all processes
        for place in idle:
            shares[place] = batches[place][:1]
    own = summed_scores(head, rows, shares, arrangement, idle)
    drop_gathered(head.model)
    sums = (own.loss, own.correct, own.tokens, *own.row_losses.tolist())
    loss, correct, tokens, *row_losses = processes.total(sums, own.row_losses.device)
    parts = _source_losses(rows, row_losses)
    return MeanScores(loss / tokens, correct / tokens, int(tokens), parts, row_losses)


def _source_losses(rows: Sequence[EncodedRow], losses: Sequence[float]) -> dict[str, float]:
    """The mean loss of every source's rows, where rows have sources."""
    sums: dict[str, list[float]] = {}
    for row, loss in zip(rows, losses, strict=True):
        if row.origin:
            total = sums.setdefault(row.origin, [0.0, 0.0])
            total[0] += loss
            total[1] += row.supervised
    return {name: loss / tokens for name, (loss, tokens) in sums.items()}


def evaluation_loss(
    head: LanguageModelHead,
    rows: Sequence[EncodedRow],
    arrangement: Arrangement,
    batch_size: int,
) -> tuple[float, float, int]:
    """Mean loss, token accuracy and number of supervised tokens alone."""
    return evaluation_scores(head, rows, arrangement, batch_size)[:3]


class Answers(NamedTuple):
    """The greedy answer to each prompt, and for each metric its numbers of each prompt."""

    texts: list[str]
    parts: dict[str, list[list[float]]]

    @property
    def exact(self) -> list[float]:
        """1 where an answer is one of the references, else 0; empty where it was not asked for."""
        return [hit for [hit] in self.parts.get(EXACT_MATCH, [])]


def answer_prompts(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[GenerationPrompt],
    config: EvaluateConfig,
    pad_id: int,
    prompt_format: PromptFormat | None,
) -> Answers:
    """Answer prompts and compare each answer with the references of its prompt.

    Both are decoded from ids in the same way: see ``COMPARED``.
    """
    chosen = prompts[: config.generate_limit] if config.generate else []
    if not chosen:
        return Answers([], {})
    sampling = Sampling(config.max_new_tokens, batch_size=config.batch_size)
    ids = [prompt.prompt_ids for prompt in chosen]
    stops = stop_ids(model, tokenizer, prompt_format)
    answers = generate_answers(model, tokenizer, ids, sampling, pad_id, stops)
    right = [references(prompt, tokenizer, stops) for prompt in chosen]
    compared = [(answer.strip(), those) for answer, those in zip(answers, right, strict=True)]
    parts = {
        metric.name: [metric.parts(answer, those) for answer, those in compared]
        for metric in text_metrics(config.metrics)
    }
    return Answers(answers, parts)


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
    """Loss, perplexity, token accuracy and metrics, with the adapter and without it.

    Args:
        wrapped: the model, in eval mode.
        head: its loss head.
        tokenizer: decodes answers.
        data: has evaluation rows, and prompts where the format has them.
        arrangement: how rows lie in the sequences of a batch.
        config: what to measure.
    """
    adapted = _measure(head, tokenizer, data, arrangement, config)
    base, gains = None, dict[str, Gain]()
    base_answers = [""] * len(adapted.answers)
    if config.base:
        with disabled(wrapped):
            base = _measure(head, tokenizer, data, arrangement, config)
        gains, base_answers = _gains(adapted, base), base.answers
    stops = stop_ids(head.model, tokenizer, data.answer_format) if adapted.answers else []
    samples = [
        Sample(
            tokenizer.decode(p.prompt_ids, skip_special_tokens=True),
            references(p, tokenizer, stops)[0],
            before,
            after,
        )
        for p, before, after in zip(data.prompts, base_answers, adapted.answers, strict=False)
    ]
    names = tokenizer.convert_ids_to_tokens(stops)
    metrics = base.metrics if base else None
    return Evaluation(len(data.eval), adapted.metrics, metrics, gains, samples, names)


class _Measured(NamedTuple):
    """One model's metrics, the numbers of every prompt behind them, and its answers."""

    metrics: Metrics
    measures: list[TextMetric]
    parts: dict[str, list[list[float]]]
    answers: list[str]


def _measure(
    head: LanguageModelHead,
    tokenizer: Tokenizer,
    data: PreparedData,
    arrangement: Arrangement,
    config: EvaluateConfig,
) -> _Measured:
    scores = evaluation_scores(head, data.eval, arrangement, config.batch_size)
    answers = answer_prompts(
        head.model, tokenizer, data.prompts, config, data.pad_id, data.answer_format
    )
    parts = {"loss": _loss_parts(data.eval, scores.row_losses), **answers.parts}
    measures = [TokenMean("loss"), *text_metrics(answers.parts)]
    exact = answers.exact
    metrics = Metrics(
        loss=scores.loss,
        perplexity=math.exp(min(scores.loss, 700.0)),
        token_accuracy=scores.token_accuracy,
        exact_match=sum(exact) / len(exact) if exact else None,
        tokens=scores.tokens,
        prompts=len(answers.texts),
        source_losses=scores.source_losses,
        scores={measure.name: estimated(measure, parts[measure.name]) for measure in measures},
    )
    return _Measured(metrics, measures, parts, answers.texts)


def _loss_parts(rows: Sequence[EncodedRow], losses: Sequence[float]) -> list[list[float]]:
    """Summed loss and supervised tokens of the rows of each question."""
    return [
        [sum(losses[n] for n in numbers), float(sum(rows[n].supervised for n in numbers))]
        for numbers in units(rows)
    ]


def _gains(adapted: _Measured, base: _Measured) -> dict[str, Gain]:
    return {
        measure.name: gained(measure, adapted.parts[measure.name], base.parts[measure.name])
        for measure in adapted.measures
    }
