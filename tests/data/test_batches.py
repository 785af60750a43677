from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from loratune.data.batches import BatchPlan, evaluation_batches, shard
from loratune.data.collate import Batch, collate, collate_together
from loratune.data.encoded_rows import EncodedRow
from loratune.data.packing import pack
from loratune.errors import DataError

DRAW = random.Random(7)
LENGTHS = [DRAW.randint(3, 60) for _ in range(103)]


def plan(**options: object) -> BatchPlan:
    settings = {"batch_size": 8, "seed": 3, "steps": 40, **options}
    return BatchPlan(LENGTHS, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("grouped", [False, True])
def test_the_rows_of_a_step_need_only_the_seed_and_its_number(grouped: bool) -> None:
    through = plan(group_by_length=grouped)
    for step in range(40):
        through.step_rows(step)
    for step in (33, 5, 20):
        fresh = plan(group_by_length=grouped)
        assert fresh.step_rows(step) == through.step_rows(step)


@pytest.mark.parametrize("grouped", [False, True])
def test_every_epoch_visits_every_row_once_in_a_fresh_order(grouped: bool) -> None:
    ours = plan(group_by_length=grouped)
    epochs = [
        [row for step in range(13) for row in ours.step_rows(epoch * 13 + step)]
        for epoch in range(3)
    ]
    assert all(sorted(rows) == list(range(103)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = plan(group_by_length=grouped, seed=4)
    assert [row for step in range(13) for row in other.step_rows(step)] != epochs[0]


@pytest.mark.parametrize("grouped", [False, True])
def test_accumulation_of_small_batches_has_the_rows_of_one_large(grouped: bool) -> None:
    whole = plan(group_by_length=grouped)
    parts = plan(group_by_length=grouped, batch_size=2, grad_accum_steps=4)
    for step in range(40):
        micro = parts.micro_batches(step)
        assert [row for batch in micro for row in batch] == whole.micro_batches(step)[0]
        assert all(len(batch) <= 2 for batch in micro)


def test_epochs_count_the_smaller_last_step() -> None:
    assert plan(steps=None, epochs=1).total_steps == 13
    assert plan(steps=None, epochs=2.5).total_steps == 33
    assert plan(steps=5).total_steps == 5
    sizes = sorted(len(plan().step_rows(step)) for step in range(13))
    assert sizes == [7] + [8] * 12


def test_no_rows_or_no_epochs_are_0_steps() -> None:
    with pytest.raises(DataError, match=r"0 optimizer steps: 0 rows, 8 rows a step"):
        BatchPlan([], batch_size=8, steps=3)
    with pytest.raises(DataError, match="0 optimizer steps"):
        plan(steps=None, epochs=None)


def padding(ours: BatchPlan) -> int:
    steps = [[LENGTHS[row] for row in ours.step_rows(step)] for step in range(13)]
    return sum(max(step) * len(step) - sum(step) for step in steps)


def test_grouping_by_length_saves_padding_and_keeps_the_order_random() -> None:
    grouped = plan(group_by_length=True)
    assert padding(grouped) < padding(plan()) / 4
    longest = [max(LENGTHS[row] for row in grouped.step_rows(step)) for step in range(13)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_the_order_is_the_same_in_every_python() -> None:
    assert BatchPlan([1] * 6, batch_size=6, seed=0, steps=1).step_rows(0) == [4, 2, 3, 5, 1, 0]


def test_shards_are_disjoint_and_whole_and_may_be_empty() -> None:
    for rows, world in (([4, 7, 1, 9, 2], 2), ([5], 3)):
        parts = [shard(rows, rank, world) for rank in range(world)]
        assert sorted(n for part in parts for n in part) == sorted(rows)
    assert shard([5], 1, 3) == []


def test_evaluation_visits_every_row_once_by_length() -> None:
    batches = evaluation_batches(LENGTHS, 16)
    order = [row for batch in batches for row in batch]
    assert sorted(order) == list(range(103))
    assert [LENGTHS[row] for row in order] == sorted(LENGTHS)


def row(length: int, prompt: int, first: int = 10) -> EncodedRow:
    ids = list(range(first, first + length))
    return EncodedRow(ids, ((prompt, length),), prompt, f"f:{first}")


def test_padding_is_on_the_right_and_counted_nowhere_whatever_its_id() -> None:
    rows = [row(5, 2), row(3, 1)]
    batch = collate(rows, pad_id=12, row_ids=[8, 4])  # 12 is a token of both rows too
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14], [10, 11, 12, 12, 12]]
    assert batch.targets.rows.tolist() == [1, 2, 3, 5, 6]
    assert batch.targets.tokens.tolist() == [12, 13, 14, 11, 12]
    assert (batch.row_ids, batch.tokens, batch.supervised) == ((8, 4), 8, 5)
    assert batch.input_ids.dtype == batch.targets.rows.dtype == torch.long


def test_an_empty_share_of_a_batch_is_an_empty_batch() -> None:
    batch = collate([], pad_id=0)
    assert batch.input_ids.shape == (0, 0) and batch.supervised == 0


def rows_in(batch: Batch, numbers: range) -> dict[int, tuple[list[int], list[int], list[int]]]:
    """Ids, positions and labels of every row, read back along what its tokens see."""
    assert batch.position_ids is not None and batch.subtree_ends is not None
    ids, ends = batch.input_ids.reshape(-1).tolist(), batch.subtree_ends
    width = batch.input_ids.shape[1]
    predicted: dict[int, list[int]] = {place: [] for place in range(len(ids))}
    for place, token in zip(*(part.tolist() for part in batch.targets), strict=True):
        predicted[place] = [*predicted[place], token]
    leaves = [
        (sequence, place)
        for sequence in range(len(batch.input_ids))
        for place in range(width)
        if int(ends[sequence, place]) == place + 1 and not is_padding(batch, sequence, place)
    ]
    found = {}
    for number, (sequence, leaf) in zip(numbers, leaves, strict=True):
        path = [place for place in range(leaf + 1) if leaf < int(ends[sequence, place])]
        flat = [sequence * width + place for place in path]
        positions = batch.position_ids[sequence][path].tolist()
        labels = [
            ids[after] if ids[after] in predicted[place] else -100
            for place, after in pairwise(flat)
        ]
        found[batch.row_ids[number]] = ([ids[place] for place in flat], positions, [-100, *labels])
    return found


def is_padding(batch: Batch, sequence: int, place: int) -> bool:
    """Behind the last token that anything but itself sees, or that stands at a later position."""
    positions = batch.position_ids[sequence]
    return place > 0 and int(positions[place]) == 0 and bool((positions[place:] == 0).all())


def test_packed_sequences_hold_exactly_the_unpacked_rows() -> None:
    rows = [row(length, 1 + length // 2, 100 * n) for n, length in enumerate([9, 4, 7, 3, 6], 1)]
    bins = pack([len(one) for one in rows], 16)
    batch = collate_together(rows, bins, 0, row_ids=range(5), share=False)
    expected = {n: (one.input_ids, list(range(len(one))), one.labels) for n, one in enumerate(rows)}
    assert rows_in(batch, range(5)) == expected
    assert batch.tokens == 29 and batch.supervised == sum(one.supervised for one in rows)


def test_packing_fits_every_row_once_and_wastes_little() -> None:
    for seed in range(20):
        draw = random.Random(seed)
        lengths = [draw.randint(1, 64) for _ in range(40)]
        bins = pack(lengths, 64)
        assert sorted(n for rows in bins for n in rows) == list(range(40))
        assert all(sum(lengths[n] for n in rows) <= 64 for rows in bins)
        assert len(bins) <= 11 / 9 * -(-sum(lengths) // 64) + 1
    totals = [sum(LENGTHS[n] for n in rows) for rows in pack(LENGTHS, 512)]
    assert sum(totals) > 0.95 * max(totals) * len(totals)
    assert pack([], 8) == []


def test_a_row_that_fits_no_sequence_is_refused() -> None:
    with pytest.raises(DataError, match="9 tokens does not fit into 8"):
        pack([3, 9], 8)
