"""What a model scores on each prompt, so that differences can be paired prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loratune.config.schema import EvaluateConfig
from loratune.data.collate import collate
from loratune.data.encoded_rows import EncodedRow
from loratune.data.prepare import GenerationPrompt
from loratune.generation import Sampling, generate_answers
from loratune.loss import LanguageModelHead
from loratune.training.forward import batch_loss


@dataclass(frozen=True)
class UnitScores:
    """Sums over each unit's supervised tokens.

    Attributes:
        loss: in nats.
        correct: tokens ranked first.
        tokens: how many there are.
    """

    loss: list[float]
    correct: list[float]
    tokens: list[float]

    @property
    def mean_loss(self) -> float:
        """Nats per token over all units."""
        return sum(self.loss) / sum(self.tokens)

    @property
    def token_accuracy(self) -> float:
        """Share of tokens ranked first."""
        return sum(self.correct) / sum(self.tokens)


@torch.inference_mode()
def score_units(
    head: LanguageModelHead,
    rows: Sequence[EncodedRow],
    groups: Sequence[Sequence[int]],
    pad_id: int,
    batch_size: int,
) -> UnitScores:
    """Losses of every unit; a unit's rows share batches with no other's.

    Args:
        head: the model in eval mode.
        rows: encoded rows.
        groups: row numbers of each unit.
        pad_id: fills short rows.
        batch_size: most rows at a time.
    """
    device = next(head.model.parameters()).device
    scores = UnitScores([], [], [])
    for group in groups:
        loss = correct = tokens = 0.0
        for start in range(0, len(group), batch_size):
            chosen = [rows[number] for number in group[start : start + batch_size]]
            result = batch_loss(head, collate(chosen, pad_id).to(device), count_correct=True)
            assert result.correct is not None
            loss, correct = loss + float(result.total), correct + float(result.correct)
            tokens += result.tokens
        scores.loss.append(loss)
        scores.correct.append(correct)
        scores.tokens.append(tokens)
    return scores


def answer_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[GenerationPrompt],
    config: EvaluateConfig,
    pad_id: int,
) -> tuple[list[str], list[float]]:
    """The greedy answer to each prompt, and 1 where it is one of the references, else 0."""
    chosen = prompts[: config.generate_limit] if config.generate else []
    if not chosen:
        return [], []
    sampling = Sampling(config.max_new_tokens, batch_size=config.batch_size)
    ids = [prompt.prompt_ids for prompt in chosen]
    answers = generate_answers(model, tokenizer, ids, sampling, pad_id)
    exact = [
        float(answer.strip() in prompt.references)
        for answer, prompt in zip(answers, chosen, strict=True)
    ]
    return answers, exact
