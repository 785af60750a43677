"""What a recipe computes: steps, tokens, and the largest micro-batch it will meet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loratune.config.mixture import training_paths
from loratune.config.schema import RowFormat, RunConfig, TrainerConfig
from loratune.data.arrangement import Arrangement, assumed_arrangement
from loratune.data.encoded_rows import EncodedRow
from loratune.data.findings import Audit
from loratune.data.prepare import PreparedData
from loratune.data.report import DataReport
from loratune.data.training_set import TrainingSet
from loratune.errors import ModelError
from loratune.plan.preview import read_prepared

STEPS_LOOKED_AT = 2000
"""Steps whose batches are laid out; a longer run repeats what they look like."""


@dataclass(frozen=True)
class MicroBatch:
    """The shape of one micro-batch.

    Attributes:
        sequences: how many; ``length``: tokens of the longest, to which the others are filled up.
        supervised: tokens that the head runs on.
        longest_row: tokens of the longest row, where sequences hold several.
        row_tokens: tokens of all its rows.
    """

    sequences: int
    length: int
    supervised: int
    longest_row: int = 0
    row_tokens: int = 0

    @property
    def rows_alone(self) -> tuple[int, int]:
        """Sequences and length of about as many tokens, with no position that no row has."""
        length = self.longest_row or self.length
        return max(1, self.tokens // length), length

    @property
    def is_masked(self) -> bool:
        """Whether sequences hold several rows, which a mask keeps apart."""
        return 0 < self.longest_row < self.length

    @property
    def tokens(self) -> int:
        """Tokens computed, padding included."""
        return self.sequences * self.length


@dataclass(frozen=True)
class Workload:
    """A whole run.

    Attributes:
        steps: optimizer steps.
        epochs: passes over the rows; ``None`` where the rows are not known.
        tokens: tokens computed in all training steps: with padding, what rows share once.
        row_tokens: tokens of the rows in them.
        supervised: tokens with loss in them.
        largest: the micro-batch with the most tokens.
        evaluation_tokens: tokens of one pass over the evaluation rows.
        report: what became of the rows, where they could be read.
        audit: what is doubtful about them.
        assumed: why rows were assumed, or an empty string.
        times_seen: mixtures only: how often the run sees a row of each source, on average.
    """

    steps: int
    epochs: float | None
    tokens: int
    supervised: int
    largest: MicroBatch
    row_tokens: int = 0
    evaluation_tokens: int = 0
    report: DataReport | None = None
    audit: Audit | None = None
    assumed: str = ""
    times_seen: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """The recipe's rows and how they fit its model, or why there are none to look at."""

    data: PreparedData | None
    audit: Audit | None = None
    reason: str = ""


def read_workload_rows(config: RunConfig) -> Rows:
    """The rows as training gets them; a model that is not here leaves them unread.

    Raises:
        LoratuneError: rows that cannot be used.
    """
    if not training_paths(config.data):
        return Rows(None, reason="no rows are named (data.path)")
    try:
        read = read_prepared(config)
    except ModelError as error:
        return Rows(None, reason=f"the tokenizer is not here ({error.cause})")
    Audit(read.findings, ()).raise_errors()  # nothing can be measured on such rows
    return Rows(read.data, read.audit)


def workload(config: RunConfig, rows: Rows, arrangement: Arrangement | None = None) -> Workload:
    """Lay out the batches as training would, or assume rows of ``data.max_length`` tokens.

    Args:
        config: the recipe.
        rows: its rows.
        arrangement: how the model takes them; by default any layout is exact.

    Raises:
        DataError: if the recipe makes no step.
    """
    if rows.data is None:
        return _assumed(config, rows.reason)
    data = rows.data
    packed = config.data.max_length if config.data.packing else 0
    arrangement = replace(arrangement or assumed_arrangement(config), packed=packed)
    plan = TrainingSet.from_config(data.train, arrangement, config.data, config.trainer).plan
    looked_at = min(plan.total_steps, STEPS_LOOKED_AT)
    batches = [
        _shape([data.train[number] for number in numbers], arrangement)
        for step in range(looked_at)
        for numbers in plan.micro_batches(step)
    ]
    share = plan.total_steps / looked_at
    return Workload(
        plan.total_steps,
        plan.total_steps / plan.steps_per_epoch,
        round(share * sum(batch.tokens for batch in batches)),
        round(share * sum(batch.supervised for batch in batches)),
        max(batches, key=lambda batch: batch.tokens),
        round(share * sum(batch.row_tokens for batch in batches)),
        sum(map(len, data.eval)),
        data.report,
        rows.audit,
        times_seen=plan.times_seen(),
    )


def _shape(rows: list[EncodedRow], arrangement: Arrangement) -> MicroBatch:
    lengths, supervised = [len(row) for row in rows], sum(row.supervised for row in rows)
    return MicroBatch(*arrangement.shape(rows), supervised, max(lengths), sum(lengths))


def _assumed(config: RunConfig, reason: str) -> Workload:
    trainer, length = config.trainer, config.data.max_length
    batch = MicroBatch(trainer.batch_size, length, trainer.batch_size * length)
    steps = trainer.steps or 0
    tokens = steps * trainer.grad_accum_steps * batch.tokens
    full = f"{reason}: every row is taken to have data.max_length={length} tokens"
    if config.data.format is not RowFormat.text:
        full += ", all of them supervised"
    return Workload(steps, None, tokens, tokens, batch, assumed=full)


def divided(trainer: TrainerConfig) -> list[tuple[int, int]]:
    """(batch_size, grad_accum_steps) with the same rows per step, the largest batches first."""
    rows = trainer.batch_size * trainer.grad_accum_steps
    sizes = [n for n in range(trainer.batch_size, 0, -1) if rows % n == 0]
    return [(size, math.ceil(rows / size)) for size in sizes]
