"""Which rows make up which optimizer step: a pure function of the seed and the step's number.

A resumed run therefore needs to know only its step.  The rows of a step depend on the product
``batch_size * grad_accum_steps`` alone, so 4 micro-batches of 2 rows hold the rows of 1 of 8.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from loratune.config.schema import DataConfig, TrainerConfig
from loratune.data.mixture import Mixture
from loratune.data.split import shuffled
from loratune.errors import DataError

MEGABATCH_STEPS = 50
"""Steps within whose rows ``group_by_length`` sorts."""


class BatchPlan:
    """The order of rows over a whole training run.

    Every epoch visits every row once, in a fresh order; the last step of an epoch may be smaller.
    An epoch of a mixture has as many rows, in the shares of its sources: see ``data.mixture``.

    Attributes:
        total_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps per pass over the rows.
        rows_per_step: rows of a full step.

    Raises:
        DataError: if there are no rows or no steps.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        grad_accum_steps: int = 1,
        seed: int = 0,
        group_by_length: bool = False,
        steps: int | None = None,
        epochs: float | None = None,
        mixture: Mixture | None = None,
    ) -> None:
        self.lengths = lengths
        self.mixture = mixture
        self.batch_size = batch_size
        self.rows_per_step = batch_size * grad_accum_steps
        self.seed = seed
        self.group_by_length = group_by_length
        self.steps_per_epoch = math.ceil(len(self.lengths) / self.rows_per_step)
        wanted = steps if steps is not None else math.ceil((epochs or 0) * self.steps_per_epoch)
        self.total_steps = wanted if len(lengths) else 0
        if self.total_steps < 1:
            rows, size = len(self.lengths), self.rows_per_step
            cause = f"0 optimizer steps: {rows} rows, {size} rows a step, {epochs or 0} epochs"
            raise DataError(cause, where="trainer", fix="set trainer.steps or trainer.epochs")
        self._epoch = lru_cache(maxsize=2)(self._order_epoch)

    @classmethod
    def from_config(
        cls,
        lengths: Sequence[int],
        data: DataConfig,
        trainer: TrainerConfig,
        mixture: Mixture | None = None,
    ) -> BatchPlan:
        """The plan of a recipe; packing fills sequences best with rows of unlike length.

        Args:
            lengths: of the rows, or other numbers that are near each other for like rows.
            data: how rows are grouped.
            trainer: how many make a step.
            mixture: the shares of several sources.
        """
        return cls(
            lengths,
            batch_size=trainer.batch_size,
            grad_accum_steps=trainer.grad_accum_steps,
            seed=trainer.seed,
            group_by_length=data.group_by_prefix or (data.group_by_length and not data.packing),
            steps=trainer.steps,
            epochs=trainer.epochs,
            mixture=mixture,
        )

    def step_rows(self, step: int) -> list[int]:
        """Row numbers of optimizer step ``step`` (from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch).step(place)

    def times_seen(self) -> dict[str, float]:
        """How often the whole run sees a row of each source of a mixture, on average."""
        if self.mixture is None:
            return {}
        epochs, steps = divmod(self.total_steps, self.steps_per_epoch)
        last = Counter(row for place in range(steps) for row in self._epoch(epochs).step(place))
        parts = zip(self.mixture.names, self.mixture.draws, self.mixture.members, strict=True)
        return {
            name: (epochs * count + sum(last[row] for row in rows)) / len(rows)
            for name, count, rows in parts
        }

    def micro_batches(self, step: int) -> list[list[int]]:
        """The step's rows in micro-batches of ``batch_size``; fewer in a smaller last step."""
        return [list(rows) for rows in batched(self.step_rows(step), self.batch_size)]

    def _order_epoch(self, epoch: int) -> _Epoch:
        if self.mixture is not None:
            order = array("q", self.mixture.epoch(epoch, self.seed))
        else:
            order = shuffled(len(self.lengths), self.seed, epoch)
        if not self.group_by_length:
            return _Epoch(order, self.rows_per_step, range(self.steps_per_epoch))
        size = self.rows_per_step * MEGABATCH_STEPS
        for start in range(0, len(order), size):
            like = self._like_lengths(order[start : start + size])
            order[start : start + size] = array("q", like)
        return _Epoch(
            order, self.rows_per_step, shuffled(self.steps_per_epoch, self.seed, epoch, 1)
        )

    def _like_lengths(self, order: Sequence[int]) -> Iterable[int]:
        """The rows of some steps by length; of a mixture, every step keeps the sources' shares."""
        # A stable sort: rows of equal length stay in their random order.
        key = self.lengths.__getitem__
        if self.mixture is None:
            return sorted(order, key=key)
        by_length = self.mixture.by_length(order, self.lengths)
        steps = batched(by_length, self.rows_per_step)
        return (row for step in steps for row in sorted(step, key=key))  # like micro-batches


@dataclass(frozen=True)
class _Epoch:
    """The order of one epoch, in eight bytes a row.

    Attributes:
        rows: row numbers; every ``size`` of them make a step, the last one perhaps fewer.
        size: rows of a full step.
        places: the order of the steps.
    """

    rows: array[int]
    size: int
    places: Sequence[int]

    def step(self, number: int) -> list[int]:
        """Row numbers of a step."""
        start = self.places[number] * self.size
        return self.rows[start : start + self.size].tolist()


def batched(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """``size`` of them at a time, the last time perhaps fewer."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def evaluation_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """All rows in batches of like length, shortest first: little padding, always the same."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [list(rows) for rows in batched(order, batch_size)]


def shard(rows: Sequence[int], rank: int, world: int) -> list[int]:
    """The part of a micro-batch that process ``rank`` of ``world`` computes; may be empty."""
    return list(rows[rank::world])
