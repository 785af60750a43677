"""Rows to tensors, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratune.data.encoded_rows import EncodedRow
from loratune.data.packing import pack
from loratune.loss.constants import IGNORED

PADDING = -1
"""The segment of padding in a packed batch."""


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right to the longest; all tensors are int64, (sequences, tokens).

    Attributes:
        input_ids: token ids.
        labels: ``input_ids`` where supervised, else -100; not shifted.
        row_ids: the caller's row numbers, in the order of the sequences (packed: of the segments).
        tokens: tokens that are not padding.
        supervised: supervised tokens: what the summed loss is divided by.
        position_ids: packed batches only: from 0 in every row.
        segment_ids: packed batches only: the row's number within its sequence, -1 on padding; a
            token sees earlier tokens of its own segment only.
        sources: mixtures only: the number of every token's source.
        source_tokens: mixtures only: supervised tokens of every source.
    """

    input_ids: Tensor
    labels: Tensor
    row_ids: tuple[int, ...]
    tokens: int
    supervised: int
    position_ids: Tensor | None = None
    segment_ids: Tensor | None = None
    sources: Tensor | None = None
    source_tokens: tuple[int, ...] = ()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> Batch:
        """The batch in memory that a CUDA device can copy from while it computes."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            input_ids=change(self.input_ids),
            labels=change(self.labels),
            position_ids=None if self.position_ids is None else change(self.position_ids),
            segment_ids=None if self.segment_ids is None else change(self.segment_ids),
            sources=None if self.sources is None else change(self.sources),
        )


def collate(
    rows: Sequence[EncodedRow],
    pad_id: int,
    row_ids: Sequence[int] = (),
    sources: Sequence[str] = (),
) -> Batch:
    """One row a sequence; no rows give a batch of shape (0, 0).

    Args:
        rows: encoded rows.
        pad_id: fills short rows.
        row_ids: the caller's numbers of the rows.
        sources: the names of a mixture's sources, to tell their tokens apart.
    """
    return Batch(
        input_ids=_padded([row.input_ids for row in rows], pad_id),
        labels=_padded([row.labels for row in rows], IGNORED),
        row_ids=tuple(row_ids),
        tokens=sum(map(len, rows)),
        supervised=sum(row.supervised for row in rows),
        sources=_padded([_own(row, sources) for row in rows], 0) if sources else None,
        source_tokens=_source_tokens(rows, sources),
    )


def collate_packed(
    rows: Sequence[EncodedRow],
    pad_id: int,
    max_length: int,
    row_ids: Sequence[int] = (),
    sources: Sequence[str] = (),
) -> Batch:
    """Several rows a sequence, none of them longer than ``max_length`` in all.

    The first token of every row is not supervised (nothing of its own row predicts it), so that
    the shifted labels never cross from one row into the next.
    """
    bins = pack([len(row) for row in rows], max_length)
    packed = [[rows[place] for place in places] for places in bins]
    order = [place for places in bins for place in places]
    return Batch(
        input_ids=_padded([_chained([r.input_ids for r in seq]) for seq in packed], pad_id),
        labels=_padded([_chained([r.labels for r in seq]) for seq in packed], IGNORED),
        row_ids=tuple(row_ids[place] for place in order) if row_ids else (),
        tokens=sum(map(len, rows)),
        supervised=sum(row.supervised for row in rows),
        position_ids=_padded([_chained([range(len(r)) for r in seq]) for seq in packed], 0),
        segment_ids=_padded(
            [_chained([[n] * len(r) for n, r in enumerate(seq)]) for seq in packed], PADDING
        ),
        sources=_padded([_chained([_own(r, sources) for r in seq]) for seq in packed], 0)
        if sources
        else None,
        source_tokens=_source_tokens(rows, sources),
    )


def _own(row: EncodedRow, sources: Sequence[str]) -> list[int]:
    """The number of the row's source, once for each of its tokens."""
    return [sources.index(row.origin)] * len(row)


def _source_tokens(rows: Sequence[EncodedRow], sources: Sequence[str]) -> tuple[int, ...]:
    return tuple(sum(row.supervised for row in rows if row.origin == name) for name in sources)


def _chained(parts: Sequence[Sequence[int]]) -> list[int]:
    return [value for part in parts for value in part]


def _padded(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max((len(sequence) for sequence in sequences), default=0)
    padded = [[*sequence, *[value] * (width - len(sequence))] for sequence in sequences]
    return torch.tensor(padded, dtype=torch.long).reshape(len(sequences), width)
