"""The order of a mixture: shares to the row, and all rows of a source equally often."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest

from loratune.data.batches import BatchPlan
from loratune.data.encoded_rows import EncodedRow
from loratune.data.mixture import Mixture, apportioned

SIZES = {"task": 40, "general": 150, "small": 7}
WEIGHTS = {"task": 3.0, "general": 1.0, "small": 0.5}
DRAW = random.Random(5)
ROWS = [
    EncodedRow([1] * DRAW.randint(3, 60), ((1, 3),), 1, f"{name}:{n}", origin=name)
    for name, size in SIZES.items()
    for n in range(size)
]
LENGTHS = [len(row) for row in ROWS]
TOTAL = sum(SIZES.values())


def mixture(**weights: float) -> Mixture:
    made = Mixture.of(ROWS, weights or WEIGHTS)
    assert made is not None
    return made


def plan(**options: object) -> BatchPlan:
    settings = {"batch_size": 8, "seed": 3, "steps": 60, "mixture": mixture(), **options}
    return BatchPlan(LENGTHS, **settings)  # type: ignore[arg-type]


def origins(rows: list[int]) -> Counter[str]:
    return Counter(ROWS[row].origin for row in rows)


def test_rows_without_sources_are_no_mixture() -> None:
    assert Mixture.of(ROWS, {}) is None


def test_a_source_without_rows_takes_no_share() -> None:
    assert mixture(task=1.0, absent=9.0, general=1.0).names == ("task", "general")


@pytest.mark.parametrize("seed", range(20))
def test_a_number_is_divided_by_weight_to_within_one(seed: int) -> None:
    draw = random.Random(seed)
    weights = [draw.uniform(0.5, 9) for _ in range(draw.randint(1, 6))]
    total = draw.randint(60, 500)
    counts = apportioned(total, weights)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - Fraction(weight) * total / sum(map(Fraction, weights))) < 1


def test_the_smallest_share_is_one_row() -> None:
    assert apportioned(10, [1e9, 1, 1]) == (8, 1, 1)


def test_an_epoch_draws_as_many_rows_as_there_are_in_the_shares_of_the_weights() -> None:
    assert mixture().draws == (131, 44, 22)  # 197 in shares of 6 : 2 : 1
    for epoch in range(4):
        assert origins(mixture().epoch(epoch, 3)) == {"task": 131, "general": 44, "small": 22}


def test_all_rows_of_a_source_come_equally_often_and_each_pass_in_a_fresh_order() -> None:
    drawn = [row for epoch in range(5) for row in mixture().epoch(epoch, 3)]
    for name, size in SIZES.items():
        own = [row for row in drawn if ROWS[row].origin == name]
        counts = Counter(own)
        assert len(counts) == min(size, len(own))
        assert max(counts.values()) - (min(counts.values()) if len(own) >= size else 0) <= 1
        passes = [own[n : n + size] for n in range(0, len(own) - size + 1, size)]
        assert all(len(set(rows)) == size for rows in passes)
        assert all(one != other for one, other in pairwise(passes))


def test_other_seeds_and_other_sources_have_other_orders() -> None:
    assert mixture().epoch(0, 3) != mixture().epoch(0, 4)
    twins = [EncodedRow([1, 1], ((1, 2),), 1, "", origin=name) for name in "ab" for _ in range(30)]
    both = Mixture.of(twins, {"a": 1.0, "b": 1.0})
    assert both is not None
    order = both.epoch(0, 0)
    assert [row for row in order if row < 30] != [row - 30 for row in order if row >= 30]


@pytest.mark.parametrize("grouped", [False, True])
def test_every_step_has_the_shares_as_nearly_as_whole_rows_allow(grouped: bool) -> None:
    ours = plan(group_by_length=grouped)
    for step in range(60):
        rows = ours.step_rows(step)
        for name, weight in WEIGHTS.items():
            share = len(rows) * weight / sum(WEIGHTS.values())
            assert abs(origins(rows)[name] - share) < 2


@pytest.mark.parametrize("grouped", [False, True])
def test_the_rows_of_a_step_need_only_the_seed_and_its_number(grouped: bool) -> None:
    through = plan(group_by_length=grouped)
    for step in range(60):
        through.step_rows(step)
    for step in (53, 5, 27):
        assert plan(group_by_length=grouped).step_rows(step) == through.step_rows(step)


@pytest.mark.parametrize("grouped", [False, True])
def test_accumulation_of_small_batches_has_the_rows_of_one_large(grouped: bool) -> None:
    whole = plan(group_by_length=grouped)
    parts = plan(group_by_length=grouped, batch_size=2, grad_accum_steps=4)
    for step in range(60):
        micro = parts.micro_batches(step)
        assert [row for batch in micro for row in batch] == whole.micro_batches(step)[0]


def test_grouping_by_length_saves_padding_and_changes_no_count() -> None:
    def padding(ours: BatchPlan) -> int:
        steps = [[LENGTHS[row] for row in ours.step_rows(step)] for step in range(25)]
        return sum(len(lengths) * max(lengths) - sum(lengths) for lengths in steps)

    assert padding(plan(group_by_length=True)) < padding(plan()) / 3
    epochs = [
        Counter(row for step in range(25) for row in plan(group_by_length=g).step_rows(step))
        for g in (False, True)
    ]
    assert epochs[0] == epochs[1] and epochs[0].total() == TOTAL


@pytest.mark.parametrize("options", [{"steps": 60}, {"steps": None, "epochs": 1.5}, {"steps": 3}])
def test_how_often_rows_are_seen_is_counted_over_the_whole_run(options: dict[str, int]) -> None:
    ours = plan(group_by_length=True, **options)
    drawn = origins([row for step in range(ours.total_steps) for row in ours.step_rows(step)])
    expected = {name: drawn[name] / size for name, size in SIZES.items()}
    assert ours.times_seen() == pytest.approx(expected)
    assert BatchPlan(LENGTHS, batch_size=8, steps=3).times_seen() == {}
