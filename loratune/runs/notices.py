"""What a process that ends tells the others, through the store that brought them together.

A collective call that fails says neither which process was lost nor why.  Whoever ends with a
reason leaves it in the store; whoever then loses the connection looks there before it ends too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from torch.distributed.distributed_c10d import Store

from loratune.errors import LoratuneError, TrainingError
from loratune.runs.background import within

LINGER = 3.0
"""Seconds that a process which lost another waits for its reason, and for others to notice."""
_POLL = 0.05


class LostProcessError(TrainingError):
    """A process of the run died, or does not answer: what was saved can be gone on from."""


class RelayedError(LoratuneError):
    """What another process said, with its own words and exit code."""

    def __init__(self, details: dict[str, Any]) -> None:
        super().__init__(details["cause"], where=details["where"], fix=details["fix"])
        self._lines, self.exit_code = list(details["lines"]), int(details["code"])
        self.kind = str(details["kind"])

    def lines(self) -> list[str]:
        return self._lines


def described(error: LoratuneError) -> dict[str, Any]:
    """An error as plain values, for ``RelayedError``."""
    kind = error.kind if isinstance(error, RelayedError) else type(error).__name__
    return {**error.as_dict(), "kind": kind, "lines": error.lines()}


def is_lost_process(error: LoratuneError) -> bool:
    """Whether a process was lost, here or as another process said it."""
    relayed = isinstance(error, RelayedError) and error.kind == LostProcessError.__name__
    return relayed or isinstance(error, LostProcessError)


class Notices:
    """The notices of one start of a run.

    Args:
        store: all processes of this start are connected to it, and no other start's.
        rank: this process.
        world: number of processes.
    """

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self._store, self._has_left = store, False
        self.rank, self.others = rank, [other for other in range(world) if other != rank]

    def leave(self, error: LoratuneError) -> None:
        """Tell the others why this process ends; a store out of reach is left alone."""
        self._has_left, text = True, json.dumps(described(error))

        def tell() -> None:
            self._store.set(_key("ended", self.rank), text)
            self._store.set(_key("heard", self.rank), "")  # whoever has a reason needs no other

        within(LINGER, tell)

    def wait_until_heard(self) -> None:
        """Rank 0 may hold the store itself: it stays until the others know why it ends.

        To be called when its connections are closed, which is what makes the others ask.
        """
        if self._has_left and self.rank == 0:
            within(2 * LINGER, self._wait_until_heard)

    def _wait_until_heard(self) -> None:
        """By looking again and again: a thread inside torch would abort a process that ends."""
        deadline = time.monotonic() + LINGER
        keys = [_key("heard", other) for other in self.others]
        while time.monotonic() < deadline and not self._store.check(keys):
            time.sleep(_POLL)

    def ask(self) -> tuple[dict[str, Any] | None, list[int]]:
        """Having lost a process: another's reason to end, or else who says nothing at all.

        Returns:
            The reason, as ``described`` gives it, and the ranks that neither gave one nor lost a
            process themselves.  Where the store cannot be reached, that is rank 0, which has it.
        """
        answer = within(2 * LINGER, self._listen)
        return answer or (None, [0] if self.rank else self.others)

    def _listen(self) -> tuple[dict[str, Any] | None, list[int]]:
        self._store.set(_key("lost", self.rank), "")
        deadline = time.monotonic() + LINGER
        while True:
            ended = self._who("ended")
            if ended:
                text = self._store.get(_key("ended", ended[0]))
                self._store.set(_key("heard", self.rank), "")
                return json.loads(text), []
            lost = self._who("lost")
            silent = [other for other in self.others if other not in lost]
            if time.monotonic() > deadline:
                return None, silent
            time.sleep(_POLL)

    def _who(self, what: str) -> list[int]:
        return [other for other in self.others if self._store.check([_key(what, other)])]


def _key(what: str, rank: int) -> str:
    return f"{what}/{rank}"


def named_ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 3 to 7`` or ``ranks 1, 3 and 9``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
