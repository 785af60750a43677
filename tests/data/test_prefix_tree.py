"""Rows of one beginning stand in one tree: every row is read back along what its tokens see."""

from __future__ import annotations

import random

import pytest

from loratune.config.schema import DataConfig, TrainerConfig
from loratune.data.arrangement import Arrangement, step_work, tree_tokens
from loratune.data.encoded_rows import EncodedRow
from loratune.data.packing import pack_trees
from loratune.data.prefix_tree import Layout, tree_order
from loratune.data.training_set import TrainingSet


def row(ids: list[int], first: int = 1, last: int | None = None) -> EncodedRow:
    last = len(ids) if last is None else last
    spans = ((first, last),) if first < last else ()
    return EncodedRow(ids, spans, first, "rows")


def drawn(seed: int, count: int = 12) -> list[EncodedRow]:
    """Rows over three tokens: they share beginnings, are beginnings of others, or are equal."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [draw.randrange(3) for _ in range(draw.randint(2, 9))]
        first = draw.randint(1, len(ids))
        rows.append(row(ids, first, draw.randint(first, len(ids))))
    return rows


def nodes(rows: list[EncodedRow]) -> int:
    """Distinct beginnings: the nodes of the rows' trie."""
    return len({tuple(one.input_ids[: n + 1]) for one in rows for n in range(len(one))})


def seen(layout: Layout, place: int) -> list[int]:
    """Places that a token sees, by the definition of ``ends``."""
    return [k for k in range(place + 1) if place < layout.ends[k]]


@pytest.mark.parametrize("seed", range(40))
def test_a_tree_holds_every_row_and_computes_every_beginning_once(seed: int) -> None:
    rows = drawn(seed)
    ordered = [rows[place] for place in tree_order(rows)]
    layout = Layout.of(ordered, share=True)
    assert len(layout.ids) == nodes(rows) == tree_tokens(rows, tree_order(rows))
    paths = {tuple(layout.ids[k] for k in seen(layout, place)) for place in range(len(layout.ids))}
    assert paths == {tuple(one.input_ids[: n + 1]) for one in rows for n in range(len(one))}
    for place, position in enumerate(layout.positions):
        assert position == len(seen(layout, place)) - 1


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_every_supervised_token_is_predicted_by_what_precedes_it(seed: int, share: bool) -> None:
    rows = drawn(seed)
    layout = Layout.of([rows[place] for place in tree_order(rows)], share=share)
    predicted = sorted(
        (*(layout.ids[k] for k in seen(layout, place)), token) for place, token in layout.targets
    )
    expected = sorted(
        tuple(one.input_ids[: n + 1]) for one in rows for a, b in one.spans for n in range(a, b)
    )
    assert predicted == expected
    if not share:
        assert len(layout.ids) == sum(map(len, rows))


@pytest.mark.parametrize("seed", range(20))
def test_trees_of_bounded_length_hold_every_row_once(seed: int) -> None:
    rows = drawn(seed, 30)
    for capacity in (9, 14, 40, 1000):
        bins = pack_trees(rows, capacity)
        assert sorted(place for places in bins for place in places) == list(range(30))
        trees = [[rows[place] for place in places] for places in bins]
        assert all(nodes(tree) <= capacity for tree in trees)
        for tree in trees:
            assert [one.input_ids for one in tree] == sorted(one.input_ids for one in tree)
    assert len(pack_trees(rows, 1000)) == 1
    assert pack_trees([], 9) == []


def test_auto_shares_only_where_a_tenth_of_the_work_falls_away() -> None:
    common = list(range(100, 150))
    alike = [row([*common, n, n + 1]) for n in range(8)]
    apart = [row([n * 60 + k for k in range(52)]) for n in range(8)]
    auto, always = Arrangement(0, share="auto"), Arrangement(0, share="always")
    assert auto.batch(alike).computed == 50 + 8 * 2 == always.batch(alike).computed
    assert auto.batch(alike).tokens == 8 * 52
    plain = auto.batch(apart)
    assert plain.position_ids is None and plain.computed == 8 * 52
    assert always.batch(apart).position_ids is not None
    for arrangement in (auto, always, Arrangement(0), Arrangement(0, packed=200)):
        for rows in (alike, apart):
            sequences, length = arrangement.shape(rows)
            assert tuple(arrangement.batch(rows).input_ids.shape) == (sequences, length)


def test_fewer_tokens_are_not_shared_where_attention_among_them_costs_more() -> None:
    """Measured: E2E's rows as one tree of 890 tokens took a quarter longer than 16 rows of 64."""
    rows = [row([*range(8), *range(100 * n, 100 * n + 56)]) for n in range(16)]
    auto = Arrangement(0, share="auto")
    assert tree_tokens(rows, tree_order(rows)) < 0.9 * 16 * 64
    assert auto.shape(rows) == (16, 64)
    sequences, length = Arrangement(0, share="always").shape(rows)
    assert step_work(sequences, length) < step_work(1, tree_tokens(rows, tree_order(rows)))


def test_a_beginning_longer_than_most_trees_is_computed_once() -> None:
    beginning = [7] * 2000
    rows = [row([*beginning, *range(100 * n, 100 * n + 100)]) for n in range(1, 17)]
    assert Arrangement(0, share="auto").shape(rows) == (1, 2000 + 16 * 100)


def test_evaluation_visits_every_row_once_in_the_order_that_computes_least() -> None:
    draw = random.Random(3)
    starts = [[n * 100 + k for k in range(40)] for n in range(4)]
    rows = [row([*draw.choice(starts), *[7] * draw.randint(1, 30)]) for _ in range(64)]
    for share in ("never", "auto"):
        arrangement = Arrangement(0, share=share)
        batches = arrangement.evaluation_batches(rows, 8)
        assert sorted(n for batch in batches for n in batch) == list(range(64))
        assert batches == arrangement.evaluation_batches(rows, 8)
    by_length = Arrangement(0).evaluation_batches(rows, 8)

    def computed(batches: list[list[int]]) -> int:
        return sum(arrangement.batch([rows[n] for n in batch]).computed for batch in batches)

    assert computed(batches) < computed(by_length) / 2


def test_grouped_by_prefix_every_row_comes_once_and_less_is_computed() -> None:
    draw = random.Random(5)
    starts = [[n * 50 + k for k in range(30)] for n in range(12)]
    rows = [row([*draw.choice(starts), *draw.choices(range(900, 990), k=4)]) for _ in range(240)]
    trainer = TrainerConfig(epochs=2, batch_size=8, seed=3)
    sets = {
        grouped: TrainingSet.from_config(
            rows, Arrangement(0, share="auto"), DataConfig(group_by_prefix=grouped), trainer
        )
        for grouped in (False, True)
    }
    computed = {
        grouped: sum(batch.computed for step in range(30) for batch in one.micro_batches(step))
        for grouped, one in sets.items()
    }
    assert computed[True] < computed[False] / 2
    for epoch in range(2):
        steps = range(30 * epoch, 30 * epoch + 30)
        assert sorted(n for s in steps for n in sets[True].plan.step_rows(s)) == list(range(240))
    orders = [[sets[True].plan.step_rows(s) for s in range(30 * e, 30 * e + 30)] for e in (0, 1)]
    assert orders[0] != orders[1]
