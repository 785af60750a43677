"""Whether a model computes several rows in one sequence as it computes each alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratune.models.probes.shortened import FAILURES, shortened
from loratune.models.probes.states import TOLERANCE, ids_of, last_states
from loratune.models.row_masks import rows_apart


@dataclass(frozen=True)
class RowsTogether:
    """What a model makes of several rows in one sequence.

    Attributes:
        first_position: what the model calls the position of a row's first token.
        packing: relative deviation where rows follow each other; infinite where it fails.
        sharing: the same where rows also share the tokens that they begin with.
        random: whether two passes in training mode differ: dropout, or noise.
    """

    first_position: int = 0
    packing: float = 0.0
    sharing: float = 0.0
    random: bool = False

    @property
    def packs(self) -> bool:
        """Whether packed rows are computed as single ones."""
        return self.packing <= TOLERANCE

    @property
    def shares(self) -> bool:
        """Whether rows that share their beginnings are computed as single ones."""
        return self.sharing <= TOLERANCE


@torch.no_grad()
def probe_rows_together(model: nn.Module, longest: int, tokens: Sequence[int]) -> RowsTogether:
    """Compute three rows alone, packed, and with the beginning that two of them share once.

    Run on a copy with one block of each kind, in fp32.

    Args:
        model: a transformers model; stays as it is.
        longest: tokens of the longest row: windows that no row outgrows do not matter.
        tokens: ids to draw the rows from.
    """
    small = shortened(model)
    pool, device = ids_of(small, tokens), next(small.parameters()).device
    rows = _Rows.drawn(max(longest, 8), pool, device)
    run = last_states(small)
    alone = torch.cat([run(row) for row in rows.alone])
    scale = float(alone.abs().max())

    def deviation(layout: _Layout, first: int) -> float:
        positions = layout.positions[None] + first
        try:
            with rows_apart(small, positions, layout.ends[None]) as inputs:
                together = run(layout.ids, **inputs)[layout.places]
        except FAILURES:
            return float("inf")
        return float((together - alone).abs().max()) / scale

    packing, first = min((deviation(rows.packed, first), first) for first in _firsts(small))
    sharing = deviation(rows.shared, first)
    small.train()
    random = not torch.equal(run(rows.alone[0]), run(rows.alone[0]))
    return RowsTogether(first, packing, sharing, random)


def _firsts(model: nn.Module) -> list[int]:
    """Positions that a row could begin with: 0, or behind the row of padding in a table."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return sorted({0, *(m.padding_idx + 1 for m in tables if m.padding_idx is not None)})


@dataclass(frozen=True)
class _Layout:
    """Several rows in one sequence; ``places`` are those of the rows' tokens, row after row."""

    ids: Tensor
    positions: Tensor
    ends: Tensor
    places: Tensor


@dataclass(frozen=True)
class _Rows:
    """Three rows: two of them begin alike, the first is the longest."""

    alone: list[Tensor]
    packed: _Layout
    shared: _Layout

    @classmethod
    def drawn(cls, longest: int, pool: Tensor, device: torch.device) -> _Rows:
        """Rows of ``longest``, three quarters and a quarter of it; half is shared."""
        common, whole = longest // 2, longest
        second, third = common + max(1, common // 2), max(2, longest // 4)
        draw = torch.Generator().manual_seed(0)
        picks = torch.randint(len(pool), (whole + second - common + third,), generator=draw)
        ids = pool[picks].to(device)
        count = torch.arange(len(ids), device=device)
        one, two, three = count[:whole], count[whole:][: second - common], count[-third:]
        alone = [ids[one], ids[torch.cat([one[:common], two])], ids[three]]
        tree_ends = torch.full_like(count, len(ids))
        tree_ends[one[:common]] = whole + len(two)
        tree_ends[one[common:]] = whole
        tree_ends[two] = whole + len(two)
        shared = _Layout(
            ids,
            torch.cat([one, common + torch.arange(len(two), device=device), _upto(third, device)]),
            tree_ends,
            torch.cat([one, one[:common], two, three]),
        )
        lengths = [len(row) for row in alone]
        ends = torch.tensor(lengths, device=device).cumsum(0)
        packed = _Layout(
            torch.cat(alone),
            torch.cat([_upto(length, device) for length in lengths]),
            ends.repeat_interleave(torch.tensor(lengths, device=device)),
            _upto(sum(lengths), device),
        )
        return cls(alone, packed, shared)


def _upto(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)
