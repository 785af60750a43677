"""The rows of a training and their order, handed out as batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loratune.config.mixture import source_weights
from loratune.config.schema import DataConfig, TrainerConfig
from loratune.data.arrangement import Arrangement
from loratune.data.batches import BatchPlan, shard
from loratune.data.cached_rows import row_lengths
from loratune.data.collate import Batch
from loratune.data.encoded_rows import EncodedRow
from loratune.data.mixture import Mixture
from loratune.data.prefix_tree import prefix_ranks
from loratune.runs import processes


@dataclass(frozen=True)
class TrainingSet:
    """What to train on, in which order.

    Attributes:
        rows: encoded rows.
        plan: the rows of every optimizer step, a function of the seed and the step alone.
        arrangement: how the rows of a batch lie in its sequences.
        together: whether a process computes in every micro-batch, also in those that have fewer
            rows than there are processes: a sharded base's weights are gathered by all of them.
    """

    rows: Sequence[EncodedRow]
    plan: BatchPlan
    arrangement: Arrangement
    together: bool = False

    @classmethod
    def from_config(
        cls,
        rows: Sequence[EncodedRow],
        arrangement: Arrangement,
        data: DataConfig,
        trainer: TrainerConfig,
    ) -> TrainingSet:
        """Rows in a recipe's order and batches."""
        mixture = Mixture.of(rows, source_weights(data))
        likeness = prefix_ranks(rows) if data.group_by_prefix else row_lengths(rows)
        plan = BatchPlan.from_config(likeness, data, trainer, mixture)
        return cls(rows, plan, arrangement)

    def micro_batches(self, step: int) -> list[Batch]:
        """This process's share of optimizer step ``step`` (from 0), on the CPU."""
        rank, world = processes.rank(), processes.world_size()
        whole = self.plan.micro_batches(step)
        shares = [(shard(numbers, rank, world), numbers) for numbers in whole]
        return [
            self.batch(mine) if mine else self._idle_batch(numbers)
            for mine, numbers in shares
            if mine or self.together
        ]

    def _idle_batch(self, numbers: Sequence[int]) -> Batch:
        """A row of other processes as a batch that nothing is learnt from or counted of."""
        row = replace(self.rows[numbers[0]], spans=())
        return replace(self.arrangement.batch([row], sources=self.sources), tokens=0, is_idle=True)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The rows with these numbers as one batch."""
        chosen = [self.rows[number] for number in numbers]
        return self.arrangement.batch(chosen, numbers, self.sources)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of a mixture's sources."""
        return self.plan.mixture.names if self.plan.mixture else ()

    def source(self, number: int) -> str:
        """``file:line`` of a row."""
        return self.rows[number].source
