"""What a comparison consists of, and which tasks of it can be done now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loratune.compare.contenders import Contender
from loratune.compare.result import Trial, build
from loratune.compare.search import Point, Results, Search
from loratune.compare.store import CachedResult, Store, fingerprint
from loratune.config.convert import to_plain

FAILED = "failed"
"""Key of a task's result that says why it failed."""
SECONDS = "seconds"
"""Key of a task's result that says how long it took."""


@dataclass(frozen=True)
class VariantSearch:
    """One setting and the search for its learning rate."""

    contender: Contender
    search: Search


@dataclass(frozen=True)
class Task:
    """Something to do, and where its result lies.

    Attributes:
        cached: the result's place in the folder.
        contender: whose it is; ``None`` for the base model.
        point: of a trial or a seed run.
        steps: of a trial.
        seed: of a seed run.
    """

    cached: CachedResult
    contender: Contender | None = None
    point: Point | None = None
    steps: int = 0
    seed: int = 0

    @property
    def title(self) -> str:
        """The task in words."""
        if self.contender is None:
            return "base model"
        if self.point is None:
            return f"{self.contender.label} costs"
        rate = f"lr {self.point.lr:g}"
        if self.point.ratio is not None:
            rate += f" ratio {self.point.ratio:g}"
        what = f"{self.steps} steps" if self.cached.kind == "trials" else f"seed {self.seed}"
        return f"{self.contender.label} {rate}, {what}"


@dataclass(frozen=True)
class ComparisonPlan:
    """All tasks of a comparison.

    Attributes:
        shared: fingerprint of what all tasks share: recipe, base, rows.
        searches: in the order asked for.
        seeds: of the final trainings; none for a search alone.
    """

    shared: str
    searches: Sequence[VariantSearch]
    seeds: Sequence[int]

    def open_tasks(self, store: Store) -> list[Task]:
        """Tasks that are not done and wait for nothing, searches first."""
        tasks = [task for task in self._fixed() if store.read(task.cached) is None]
        runs: list[Task] = []
        for one in self.searches:
            open_trials = one.search.open_trials(self.results(one, store))
            if open_trials:
                tasks += [self.trial(one.contender, *trial) for trial in open_trials]
            else:
                runs += [r for r in self.seed_runs(one, store) if store.read(r.cached) is None]
        # All variants of one seed before the next: what is there at any time can be compared.
        return tasks + sorted(runs, key=lambda run: run.seed)

    def results(self, one: VariantSearch, store: Store) -> Results:
        """The finished trials of one setting."""
        results: dict[tuple[Point, int], Trial] = {}
        for point in one.search.possible_points():
            for steps in one.search.rungs:
                value = store.read(self.trial(one.contender, point, steps).cached)
                if value is not None:
                    results[point, steps] = as_trial(value, point, steps)
        return results

    def seed_runs(self, one: VariantSearch, store: Store) -> list[Task]:
        """The final trainings of one setting; none before its rate is known."""
        point = one.search.winner(self.results(one, store))
        if point is None:
            return []
        return [self.seed_run(one.contender, point, seed) for seed in self.seeds]

    def count(self) -> int:
        """Tasks in all, if none fails."""
        total = len(self._fixed())
        for one in self.searches:
            points = len(one.search.points)
            for _ in one.search.rungs:
                total, points = total + points, -(-points // 2)
            total += len(self.seeds)
        return total

    def left(self, store: Store) -> int:
        """Tasks to do, as far as is known: a search may still grow."""
        searching = [s for s in self.searches if s.search.open_trials(self.results(s, store))]
        return len(self.open_tasks(store)) + len(searching) * len(self.seeds)

    def base(self) -> Task:
        """Scoring the base model."""
        return Task(CachedResult("base", "", "scores", self._key("base")))

    def costs(self, contender: Contender) -> Task:
        """Counting what a setting costs."""
        key = self._key("costs", to_plain(contender.config))
        return Task(CachedResult("costs", contender.label, "costs", key), contender)

    def trial(self, contender: Contender, point: Point, steps: int) -> Task:
        """One trial of a search."""
        key = self._key("trial", _settings(contender, point), steps)
        name = f"{steps}-steps-{point.lr:g}"
        return Task(CachedResult("trials", contender.label, name, key), contender, point, steps)

    def seed_run(self, contender: Contender, point: Point, seed: int) -> Task:
        """One final training."""
        key = self._key("member", _settings(contender, point), seed)
        cached = CachedResult("members", contender.label, f"seed-{seed}", key)
        return Task(cached, contender, point, seed=seed)

    def _fixed(self) -> list[Task]:
        """Tasks that no other decides; a search alone needs none of them."""
        if not self.seeds:
            return []
        return [self.base(), *(self.costs(one.contender) for one in self.searches)]

    def _key(self, *parts: Any) -> str:
        return fingerprint([self.shared, *parts])


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
