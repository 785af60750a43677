"""What a comparison consists of, and which pieces of it can be done now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loratune.compare.contenders import Contender
from loratune.compare.result import Trial, build
from loratune.compare.search import Point, Results, Search
from loratune.compare.store import Piece, Store, fingerprint
from loratune.config.convert import to_plain

FAILED = "failed"
"""Key of a piece's result that says why it failed."""
SECONDS = "seconds"
"""Key of a piece's result that says how long it took."""


@dataclass(frozen=True)
class Contest:
    """One contender with its search."""

    contender: Contender
    search: Search


@dataclass(frozen=True)
class Work:
    """A piece together with what doing it needs; ``point`` is of a trial, ``seed`` of a member."""

    piece: Piece
    contender: Contender | None = None
    point: Point | None = None
    steps: int = 0
    seed: int = 0

    @property
    def title(self) -> str:
        """The piece in words."""
        if self.contender is None:
            return "base model"
        if self.point is None:
            return f"{self.contender.label} costs"
        rate = f"lr {self.point.lr:g}"
        if self.point.ratio is not None:
            rate += f" ratio {self.point.ratio:g}"
        what = f"{self.steps} steps" if self.piece.kind == "trials" else f"seed {self.seed}"
        return f"{self.contender.label} {rate}, {what}"


@dataclass(frozen=True)
class ComparisonPlan:
    """All pieces of a comparison.

    Attributes:
        task: fingerprint of what all pieces share: recipe, base, rows.
        contests: in the order asked for.
        seeds: of the final trainings; none for a search alone.
    """

    task: str
    contests: Sequence[Contest]
    seeds: Sequence[int]

    def open_work(self, store: Store) -> list[Work]:
        """Pieces that are not done and wait for nothing, searches first."""
        work = [w for w in self._fixed() if store.read(w.piece) is None]
        members: list[Work] = []
        for contest in self.contests:
            open_trials = contest.search.open_trials(self.results(contest, store))
            if open_trials:
                work += [self.trial(contest.contender, *trial) for trial in open_trials]
            else:
                members += [m for m in self.members(contest, store) if store.read(m.piece) is None]
        # All variants of one seed before the next: what is there at any time can be compared.
        return work + sorted(members, key=lambda member: member.seed)

    def results(self, contest: Contest, store: Store) -> Results:
        """The finished trials of one contender."""
        results: dict[tuple[Point, int], Trial] = {}
        for point in contest.search.possible_points():
            for steps in contest.search.rungs:
                value = store.read(self.trial(contest.contender, point, steps).piece)
                if value is not None:
                    results[point, steps] = as_trial(value, point, steps)
        return results

    def members(self, contest: Contest, store: Store) -> list[Work]:
        """The final trainings of one contender; none before its rate is known."""
        point = contest.search.winner(self.results(contest, store))
        if point is None:
            return []
        return [self.member(contest.contender, point, seed) for seed in self.seeds]

    def count(self) -> int:
        """Pieces in all, if none fails."""
        total = len(self._fixed())
        for contest in self.contests:
            field = len(contest.search.points)
            for _ in contest.search.rungs:
                total, field = total + field, -(-field // 2)
            total += len(self.seeds)
        return total

    def left(self, store: Store) -> int:
        """Pieces to do, as far as is known: a search may still grow."""
        searching = [c for c in self.contests if c.search.open_trials(self.results(c, store))]
        return len(self.open_work(store)) + len(searching) * len(self.seeds)

    def base(self) -> Work:
        """Scoring the base model."""
        return Work(Piece("base", "", "scores", self._key("base")))

    def costs(self, contender: Contender) -> Work:
        """Counting what a contender costs."""
        key = self._key("costs", to_plain(contender.config))
        return Work(Piece("costs", contender.label, "costs", key), contender)

    def trial(self, contender: Contender, point: Point, steps: int) -> Work:
        """One point of a search."""
        key = self._key("trial", _settings(contender, point), steps)
        name = f"{steps}-steps-{point.lr:g}"
        return Work(Piece("trials", contender.label, name, key), contender, point, steps)

    def member(self, contender: Contender, point: Point, seed: int) -> Work:
        """One final training."""
        key = self._key("member", _settings(contender, point), seed)
        piece = Piece("members", contender.label, f"seed-{seed}", key)
        return Work(piece, contender, point, seed=seed)

    def _fixed(self) -> list[Work]:
        """Pieces that no other decides; a search alone needs none of them."""
        if not self.seeds:
            return []
        return [self.base(), *(self.costs(contest.contender) for contest in self.contests)]

    def _key(self, *parts: Any) -> str:
        return fingerprint([self.task, *parts])


def _settings(contender: Contender, point: Point) -> dict[str, Any]:
    return to_plain(point.applied(contender.config))


def as_trial(value: dict[str, Any], point: Point, steps: int) -> Trial:
    """A trial's result, or the failed trial that a dead process left."""
    if FAILED in value:
        return Trial(
            lr=point.lr, lr_ratio=point.ratio, steps=steps, loss=None, reason=value[FAILED]
        )
    trial: Trial = build(Trial, {key: item for key, item in value.items() if key != SECONDS})
    return trial
