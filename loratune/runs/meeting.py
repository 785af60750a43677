"""The processes of one start of a run find each other in a store that may hold an earlier start.

torchrun's agents keep their store when they start the processes again, and torch would read the
addresses of dead ones in it.  Neither the restart count nor any other variable that torchrun sets
is the same in all processes of one start and another in the next.  So they agree on a name first.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time

from torch.distributed.distributed_c10d import Store

from loratune.runs.notices import LostProcessError, named_ranks

_POLL = 0.02


def meet(store: Store, rank: int, world: int, timeout: float) -> str:
    """Wait for all processes of this start; returns a name that it shares with no other start.

    Each process says hello with a random word.  Rank 0 lists the words that it reads; a process
    that finds its own in the list agrees to it, and once all have, rank 0 says so.  A word of a
    dead process can stand in a list, but nobody agrees to that for it.

    Args:
        store: all processes are connected to it.
        rank: this process.
        world: number of processes.
        timeout: seconds to wait for the others.

    Raises:
        LostProcessError: naming the ranks that did not come.
    """
    deadline, word = time.monotonic() + timeout, secrets.token_hex(8)
    store.set(_hello(rank), word)
    name = ""
    while time.monotonic() < deadline:
        if rank == 0:
            words = [_read(store, _hello(other)) for other in range(world)]
            store.set("list", json.dumps(words))
        listed = _read(store, "list") or "[]"
        if json.loads(listed)[rank : rank + 1] == [word]:
            name = hashlib.sha256(listed.encode()).hexdigest()[:16]
            store.set(_agreed(rank), name)
            if rank == 0 and not _missing(store, world, name):
                store.set("start", name)
            if _read(store, "start") == name:
                return name
        time.sleep(_POLL)
    late = _missing(store, world, name) if name else [0]
    raise LostProcessError(
        f"{named_ranks(late or [0])} did not come within {timeout:g} s",
        where=f"rank {rank}, launch.timeout",
        fix="start every process, or raise launch.timeout",
    )


def _missing(store: Store, world: int, name: str) -> list[int]:
    """The ranks that have not agreed to this list."""
    return [rank for rank in range(world) if _read(store, _agreed(rank)) != name]


def _hello(rank: int) -> str:
    return f"hello/{rank}"


def _agreed(rank: int) -> str:
    return f"agreed/{rank}"


def _read(store: Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None
