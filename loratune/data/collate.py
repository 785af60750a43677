"""Rows to tensors, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratune.data.encoded_rows import EncodedRow
from loratune.data.packing import Bins
from loratune.data.prefix_tree import Layout
from loratune.loss.constants import IGNORED
from loratune.loss.supervised import Targets, causal_targets


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right to the longest; all tensors are int64.

    Attributes:
        input_ids: token ids, (sequences, length).
        targets: what is predicted where: a row per supervised token.
        row_ids: the caller's row numbers, in the order in which they lie in the sequences.
        tokens: tokens of the rows: without padding, shared ones counted for each row.
        position_ids: where sequences hold several rows: each token's position in its row.
        subtree_ends: there too, for each token the end of the tokens that see it.
        sources: mixtures only: for each of the targets the number of its row's source.
        source_tokens: mixtures only: supervised tokens of every source.
        lengths: tokens of every sequence, padding left out.
        is_idle: whether it is computed only because other processes compute theirs.
    """

    input_ids: Tensor
    targets: Targets
    row_ids: tuple[int, ...]
    tokens: int
    position_ids: Tensor | None = None
    subtree_ends: Tensor | None = None
    sources: Tensor | None = None
    source_tokens: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    is_idle: bool = False

    @property
    def not_padding(self) -> Tensor:
        """(sequences, length) whether a token is not padding, on the batch's device."""
        places = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return places < torch.tensor(self.lengths, device=places.device)[:, None]

    @property
    def supervised(self) -> int:
        """Supervised tokens: what the summed loss is divided by."""
        return self.targets.tokens.numel()

    @property
    def computed(self) -> int:
        """Tokens that the model computes, padding included."""
        return self.input_ids.numel()

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
            targets=Targets(*map(change, self.targets)),
            position_ids=None if self.position_ids is None else change(self.position_ids),
            subtree_ends=None if self.subtree_ends is None else change(self.subtree_ends),
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
        rows: the batch's rows.
        pad_id: fills short sequences.
        row_ids: the caller's numbers of the rows.
        sources: the names of a mixture's sources, to tell their tokens apart.
    """
    return Batch(
        input_ids=_padded([row.input_ids for row in rows], pad_id),
        targets=causal_targets(_padded([row.labels for row in rows], IGNORED)),
        row_ids=tuple(row_ids),
        tokens=sum(map(len, rows)),
        lengths=tuple(map(len, rows)),
        sources=_sources(rows, sources),
        source_tokens=_source_tokens(rows, sources),
    )


def collate_together(
    rows: Sequence[EncodedRow],
    bins: Bins,
    pad_id: int,
    row_ids: Sequence[int] = (),
    sources: Sequence[str] = (),
    *,
    share: bool,
    first_position: int = 0,
) -> Batch:
    """Several rows a sequence.

    Args:
        rows: the batch's rows.
        bins: which of them lie in each sequence, in which order.
        pad_id: fills short sequences.
        row_ids: the caller's numbers of the rows.
        sources: the names of a mixture's sources, to tell their tokens apart.
        share: whether what neighbours begin with in common stands there once.
        first_position: what the model calls the position of a row's first token.
    """
    layouts = [Layout.of([rows[place] for place in places], share=share) for places in bins]
    input_ids = _padded([layout.ids for layout in layouts], pad_id)
    width = input_ids.shape[1]
    # Padding is seen by itself alone, so that no line of the softmax is empty.
    ends = [[*one.ends, *range(len(one.ends) + 1, width + 1)] for one in layouts]
    return Batch(
        input_ids=input_ids,
        targets=_targets(layouts, width),
        row_ids=tuple(row_ids[place] for places in bins for place in places) if row_ids else (),
        tokens=sum(map(len, rows)),
        position_ids=_padded([layout.positions for layout in layouts], 0) + first_position,
        subtree_ends=_padded(ends, 0),
        lengths=tuple(len(layout.ids) for layout in layouts),
        sources=_sources([rows[place] for places in bins for place in places], sources),
        source_tokens=_source_tokens(rows, sources),
    )


def _sources(rows: Sequence[EncodedRow], sources: Sequence[str]) -> Tensor | None:
    """The number of the source of every target; targets stand row by row, as the rows lie."""
    if not sources:
        return None
    own = [sources.index(row.origin) for row in rows for _ in range(row.supervised)]
    return torch.tensor(own, dtype=torch.long)


def _source_tokens(rows: Sequence[EncodedRow], sources: Sequence[str]) -> tuple[int, ...]:
    return tuple(sum(row.supervised for row in rows if row.origin == name) for name in sources)


def _targets(layouts: Sequence[Layout], width: int) -> Targets:
    numbered = [
        (n * width, target) for n, layout in enumerate(layouts) for target in layout.targets
    ]
    rows = [start + place for start, (place, _) in numbered]
    return Targets(torch.tensor(rows), torch.tensor([token for _, (_, token) in numbered]))


def _padded(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max((len(sequence) for sequence in sequences), default=0)
    padded = [[*sequence, *[value] * (width - len(sequence))] for sequence in sequences]
    return torch.tensor(padded, dtype=torch.long).reshape(len(sequences), width)
