"""Processes agree on a name for their start, whatever an earlier start left in the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from loratune.runs.meeting import meet
from loratune.runs.notices import LostProcessError, Notices, RelayedError, described

WORLD = 3


def fresh_store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))


def meeting(store: dist.Store, ranks: list[int], timeout: float = 20) -> dict[int, str]:
    """The name that each rank comes to, or what it says instead; all at the same time."""

    def one(rank: int) -> str:
        client = dist.TCPStore("127.0.0.1", store.port, timeout=timedelta(seconds=20))
        try:
            return meet(client, rank, WORLD, timeout)
        except LostProcessError as error:
            return str(error)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return dict(zip(ranks, pool.map(one, ranks), strict=True))


def test_every_start_has_a_name_of_its_own_that_all_its_processes_share() -> None:
    store = fresh_store()
    names = [set(meeting(store, [0, 1, 2]).values()) for _ in range(3)]
    assert [len(name) for name in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


@pytest.mark.parametrize("late", [0, 2])
def test_a_process_that_does_not_come_is_named_and_does_not_spoil_the_next_start(late: int) -> None:
    store = fresh_store()
    present = [rank for rank in range(WORLD) if rank != late]
    said = meeting(store, present, timeout=0.5)
    for rank in present:
        assert f"rank {late} did not come within" in said[rank], said
    assert len(set(meeting(store, [0, 1, 2]).values())) == 1


def test_words_of_dead_processes_join_nothing() -> None:
    """A rank that was killed between its hello and its agreement, in a store that was kept."""
    store = fresh_store()
    before = set(meeting(store, [0, 1, 2]).values())
    store.set("hello/2", "dead")
    said = meeting(store, [0, 1], timeout=0.5)
    assert "rank 2 did not come" in said[0]
    assert set(said.values()).isdisjoint(before)


def test_the_reason_of_one_process_reaches_the_others_with_its_code() -> None:
    store = fresh_store()
    notices = [Notices(store, rank, WORLD) for rank in range(WORLD)]
    error = LostProcessError("it broke", where="rank 1", fix="mend it")
    notices[1].leave(error)
    reason, silent = notices[0].ask()
    assert reason is not None and silent == []
    assert RelayedError(reason).lines() == error.lines()
    assert RelayedError(described(RelayedError(reason))).exit_code == 5


def test_who_says_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratune.runs.notices.LINGER", 0.5)
    store = fresh_store()
    with ThreadPoolExecutor(2) as pool:
        asked = list(pool.map(lambda r: Notices(store, r, WORLD).ask(), (0, 1)))
    assert asked == [(None, [2]), (None, [2])]
