"""How the rows of a batch lie in its sequences: one each, packed, or in prefix trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise

from torch import nn

from loratune.config.schema import RunConfig
from loratune.data.batches import evaluation_batches
from loratune.data.cached_rows import row_lengths
from loratune.data.collate import Batch, collate, collate_together
from loratune.data.encoded_rows import EncodedRow
from loratune.data.packing import Bins, pack, pack_trees
from loratune.data.prefix_tree import common_length, tree_order
from loratune.errors import ConfigError, ModelError
from loratune.models.probes.rows_alone import probe_rows_alone
from loratune.models.probes.rows_together import RowsTogether, probe_rows_together

TREE_TOKENS = (128, 256, 512, 1024, 2048, 4096)
"""Tokens that a prefix tree may hold; every batch takes what costs it least."""
ATTENTION_TOKENS = 2048
"""Length at which attention under a mask costs a token as much as all linear layers do.

Measured on SmolLM2-135M (1,800 on two cores of an AMD EPYC); attention weighs less in wider models.
"""
WORTH = 0.9
"""Share of the work that must be left for ``auto`` to share."""


@dataclass(frozen=True)
class Arrangement:
    """How rows become sequences.

    Attributes:
        pad_id: fills short sequences.
        packed: tokens that a sequence of several whole rows may hold; 0 gives every row its own.
        share: "always", "never", or "auto": in the batches in which it saves a tenth of the work.
        first_position: what the model calls the position of a row's first token.
    """

    pad_id: int
    packed: int = 0
    share: str = "never"
    first_position: int = 0

    def under_dropout(self, dropout: float) -> Arrangement:
        """The same, without sharing by itself where an adapter's masks would be shared too."""
        return replace(self, share="never") if dropout and self.share == "auto" else self

    def batch(
        self,
        rows: Sequence[EncodedRow],
        row_ids: Sequence[int] = (),
        sources: Sequence[str] = (),
    ) -> Batch:
        """Rows as one batch, on the CPU; ``sources`` are the names of a mixture's."""
        trees = self._trees(rows)
        if trees is not None:
            return self._together(rows, trees, row_ids, sources, share=True)
        if self.packed:
            bins = pack([len(row) for row in rows], self.packed)
            return self._together(rows, bins, row_ids, sources, share=False)
        return collate(rows, self.pad_id, row_ids, sources)

    def evaluation_batches(self, rows: Sequence[EncodedRow], size: int) -> list[list[int]]:
        """Numbers of all rows in batches, always the same, in the order that computes least."""
        by_length = evaluation_batches([len(row) for row in rows], size)
        if self.share == "never":
            return by_length
        order = tree_order(rows)
        by_prefix = [order[start : start + size] for start in range(0, len(order), size)]
        return min(by_length, by_prefix, key=lambda batches: self._work(rows, batches))

    def _work(self, rows: Sequence[EncodedRow], batches: Sequence[Sequence[int]]) -> float:
        shapes = (self.shape([rows[number] for number in numbers]) for numbers in batches)
        return sum(step_work(*shape) for shape in shapes)

    def shape(self, rows: Sequence[EncodedRow]) -> tuple[int, int]:
        """Sequences of a batch and tokens of each, padding included."""
        trees = self._trees(rows)
        if trees is not None:
            return tree_shape(rows, trees)
        return self._unshared(rows)

    def _together(
        self,
        rows: Sequence[EncodedRow],
        bins: Bins,
        row_ids: Sequence[int],
        sources: Sequence[str],
        *,
        share: bool,
    ) -> Batch:
        first = self.first_position
        return collate_together(
            rows, bins, self.pad_id, row_ids, sources, share=share, first_position=first
        )

    def _trees(self, rows: Sequence[EncodedRow]) -> Bins | None:
        """The rows of every prefix tree, where rows share."""
        if self.share == "never" or not rows:
            return None
        sizes = (self.packed,) if self.packed else TREE_TOKENS
        choices = [pack_trees(rows, size) for size in sizes]
        work = [step_work(*tree_shape(rows, trees)) for trees in choices]
        if self.share == "auto" and min(work) > WORTH * step_work(*self._unshared(rows)):
            return None
        return choices[work.index(min(work))]

    def _unshared(self, rows: Sequence[EncodedRow]) -> tuple[int, int]:
        lengths = [len(row) for row in rows]
        if self.packed:
            bins = pack(lengths, self.packed)
            lengths = [sum(lengths[place] for place in places) for places in bins]
        return len(lengths), max(lengths, default=0)


def step_work(sequences: int, length: int) -> float:
    """What a batch of this shape costs, in tokens that see nothing but themselves."""
    return sequences * length * (1 + length / ATTENTION_TOKENS)


def tree_shape(rows: Sequence[EncodedRow], trees: Bins) -> tuple[int, int]:
    """Sequences and their length, padding included."""
    return len(trees), max(tree_tokens(rows, places) for places in trees)


def tree_tokens(rows: Sequence[EncodedRow], places: Sequence[int]) -> int:
    """Tokens of the prefix tree of these rows, which stand in the order of ``tree_order``."""
    ids = [rows[place].input_ids for place in places]
    shared = sum(common_length(one, other) for one, other in pairwise(ids))
    return sum(map(len, ids)) - shared


def sharing_line(row_tokens: int, computed: int) -> str:
    """What rows save by sharing the computation of what they begin with."""
    return (
        f"rows of a batch share what they begin with: {row_tokens:,} tokens are computed as "
        f"{computed:,} ({row_tokens / computed:.3g} ×; where the model's attention allows it)"
    )


def arrange(
    config: RunConfig, model: nn.Module, pad_id: int, *parts: Sequence[EncodedRow]
) -> tuple[Arrangement, list[str]]:
    """How a model's rows are laid out, and what is to be said about it.

    Args:
        config: the recipe.
        model: the model that will compute them, adapters included or not; it stays as it is.
        pad_id: fills short sequences.
        parts: the rows to train and to evaluate on.

    Raises:
        ModelError: a model that sees later tokens.
        ConfigError: packing, sharing or padding that this model would compute wrongly.
    """
    data = config.data
    longest = max((int(max(row_lengths(rows), default=0)) for rows in parts), default=0)
    if not longest:
        return Arrangement(pad_id), []
    sample = list(islice(chain(*parts), _LOOKED_AT))
    tokens = sorted({token for row in sample for token in row.input_ids})
    check_single_rows(config, model, longest, tokens)
    if config.trainer.router_loss:
        _check_rows_alone(config)
        return Arrangement(pad_id), []
    auto = data.share_prefixes == "auto" and _may_save(sample)
    if not (data.packing or data.share_prefixes is True or auto):
        return Arrangement(pad_id), []
    probe = probe_rows_together(model, longest, tokens)
    _require_exact(config, probe)
    packed = data.max_length if data.packing else 0
    share, note = _sharing(config, probe)
    return Arrangement(pad_id, packed, share, probe.first_position), note


def check_single_rows(
    config: RunConfig, model: nn.Module, longest: int, tokens: Sequence[int]
) -> None:
    """Check that a row's loss depends on nothing behind the token that it predicts.

    Args:
        config: the recipe.
        model: the model that will compute the rows; it stays as it is.
        longest: tokens of the longest row.
        tokens: ids that occur in them.

    Raises:
        ModelError: a model that sees later tokens.
        ConfigError: batches to be filled up, which this model would compute wrongly.
    """
    probe = probe_rows_alone(model, longest, tokens)
    if not probe.is_causal:
        raise ModelError(
            "the model is not causal: later tokens change what it makes of earlier ones "
            f"({_off(probe.later_tokens)}), so it sees the tokens that it should predict",
            where=f"model.path={config.model.path}",
            fix="choose a causal model, or the setting of its config.json that makes it one "
            "(is_decoder=true, causal=true)",
        )
    sizes = {
        "trainer.batch_size": config.trainer.batch_size,
        "evaluate.batch_size": config.evaluate.batch_size,
    }
    if not probe.pads and (padded := [key for key, size in sizes.items() if size > 1]):
        raise ConfigError(
            "this model computes a row that is filled up on the right otherwise than alone "
            f"({_off(probe.padding)})",
            where=", ".join(padded),
            fix=f"set {' '.join(f'{key}=1' for key in padded)}; trainer.grad_accum_steps makes "
            "larger batches of single rows",
        )


def assumed_arrangement(config: RunConfig, pad_id: int = 0) -> Arrangement:
    """The arrangement for a model that takes every layout exactly."""
    share, _ = _sharing(config, RowsTogether())
    return Arrangement(pad_id, config.data.max_length if config.data.packing else 0, share)


_LOOKED_AT = 2048
"""Rows that are searched for common beginnings, and whose tokens the probe's rows are made of."""


def _may_save(rows: Sequence[EncodedRow]) -> bool:
    """Whether all rows together, and so the rows of a batch, could share enough."""
    return tree_tokens(rows, tree_order(rows)) <= WORTH * sum(map(len, rows))


def _check_rows_alone(config: RunConfig) -> None:
    """Check that every token lies in a batch once and is masked by its place alone."""
    data = config.data
    for key, asked in (("packing", data.packing), ("share_prefixes", data.share_prefixes is True)):
        if asked:
            raise ConfigError(
                "the load-balancing loss of routers is computed for single rows only",
                where=f"data.{key}=true",
                fix=f"data.{key}=false, or trainer.router_loss=false",
            )


def _require_exact(config: RunConfig, probe: RowsTogether) -> None:
    if config.data.packing and not probe.packs:
        raise ConfigError(
            f"this model computes packed rows otherwise than single ones ({_off(probe.packing)})",
            where="data.packing=true",
            fix="set data.packing=false; data.group_by_length=true spends little on padding",
        )
    if config.data.share_prefixes is True and not probe.shares:
        raise ConfigError(
            "this model computes rows that share their beginnings otherwise than single ones "
            f"({_off(probe.sharing)})",
            where="data.share_prefixes=true",
            fix="set data.share_prefixes=auto or false",
        )


def _off(deviation: float) -> str:
    if deviation == float("inf"):
        return "it fails on them"
    return f"hidden states off by {deviation:.1g} of the largest"


def _sharing(config: RunConfig, probe: RowsTogether) -> tuple[str, list[str]]:
    """Whether batches share, and a note where the choice is not what one would expect."""
    asked = config.data.share_prefixes
    random = probe.random or config.adapter.dropout > 0
    if asked is True:
        note = "data.share_prefixes=true: a token that rows share gets one dropout mask for all"
        return "always", [note] if random else []
    if asked is False or not probe.shares:
        return "never", []
    if random:
        note = (
            "rows do not share the computation of what they begin with: with dropout, a shared "
            "token would get one mask for all its rows (data.share_prefixes=true does so)"
        )
        return "never", [note]
    return "auto", []
