"""Whether what a model makes of a token depends on what comes behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from loratune.models.probes.shortened import shortened
from loratune.models.probes.states import TOLERANCE, affordable_tokens, ids_of, last_states


@dataclass(frozen=True)
class RowsAlone:
    """How far what comes behind a token changes its hidden state, relative to the largest.

    Attributes:
        later_tokens: other tokens behind it, in rows of one length.
        padding: the row filled up on the right.
    """

    later_tokens: float = 0.0
    padding: float = 0.0

    @property
    def is_causal(self) -> bool:
        """Whether no token sees a later one."""
        return not self.later_tokens > TOLERANCE  # NaN is a trouble of its own, told elsewhere

    @property
    def pads(self) -> bool:
        """Whether a row in a padded batch is computed as it is alone."""
        return not self.padding > TOLERANCE


_RESULTS: WeakKeyDictionary[nn.Module, dict[int, RowsAlone]] = WeakKeyDictionary()
"""Of each model, by ``longest``."""


def probe_rows_alone(model: nn.Module, longest: int, tokens: Sequence[int]) -> RowsAlone:
    """Compute the beginning of a row alone, before two different ends, and filled up.

    Run on a copy with one block of each kind, in fp32; once for a model and a length.

    Args:
        model: a transformers model; stays as it is.
        longest: tokens of the longest row; a wide model is tried on a shorter one.
        tokens: ids to draw the row from.
    """
    results = _RESULTS.setdefault(model, {})
    if longest not in results:
        results[longest] = _probe(shortened(model), longest, tokens)
    return results[longest]


@torch.no_grad()
def _probe(small: nn.Module, longest: int, tokens: Sequence[int]) -> RowsAlone:
    run, device = last_states(small), next(small.parameters()).device
    length = max(4, min(longest, affordable_tokens(small)))
    pool, draw = ids_of(small, tokens), torch.Generator().manual_seed(0)
    row, other = pool[torch.randint(len(pool), (2, length), generator=draw)].to(device)
    cut = length // 2
    begin, fill = row[:cut], torch.zeros_like(row[cut:])
    whole, alone = run(row), run(begin)
    changed, padded = run(torch.cat([begin, other[cut:]])), run(torch.cat([begin, fill]))
    return RowsAlone(_deviation(changed[:cut], whole[:cut]), _deviation(padded[:cut], alone))


def _deviation(states: Tensor, expected: Tensor) -> float:
    return float((states - expected).abs().max()) / float(expected.abs().max())
