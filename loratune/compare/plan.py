"""What a comparison consists of, and which tasks of it can be done now."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loratune.adapters.config import AdapterConfig
from loratune.compare.result import Trial, Twin, build
from loratune.compare.search import Point, Results, Search
from loratune.compare.settings import Setting
from loratune.compare.store import FAILED, CachedResult, Store, fingerprint
from loratune.config.convert import to_plain


@dataclass(frozen=True)
class VariantSearch:
    """One setting and the search for its learning rate."""

    setting: Setting
    search: Search


@dataclass(frozen=True)
class Task:
    """Something to do, and where its result lies.

    Attributes:
        cached: the result's place in the folder.
        setting: whose it is; ``None`` for the base model.
        point: of a trial or a seed run.
        steps: of a trial.
        seed: of a seed run.
    """

    cached: CachedResult
    setting: Setting | None = None
    point: Point | None = None
    steps: int = 0
    seed: int = 0

    @property
    def title(self) -> str:
        """The task in words."""
        if self.setting is None:
            return "base model"
        if self.point is None:
            return f"{self.setting.label} costs"
        rate = f"lr {self.point.lr:g}"
        if self.point.ratio is not None:
            rate += f" ratio {self.point.ratio:g}"
        what = f"{self.steps} steps" if self.cached.kind == "trials" else f"seed {self.seed}"
        return f"{self.setting.label} {rate}, {what}"


@dataclass(frozen=True)
class ComparisonPlan:
    """All tasks of a comparison.

    Attributes:
        store: where their results lie.
        shared: fingerprint of what all tasks share: recipe, base, rows.
        searches: in the order asked for; without the twins that are not trained.
        twins: contenders that are one training, or nearly.
        seeds: of the final trainings; none for a search alone.
    """

    store: Store
    shared: str
    searches: Sequence[VariantSearch]
    seeds: Sequence[int]
    twins: Sequence[Twin] = ()

    def open_tasks(self) -> list[Task]:
        """Tasks that are not done and wait for nothing, searches first."""
        tasks, runs = self._fixed(), []
        for one in self.searches:
            tasks += [self.trial(one.setting, *trial) for trial in self._open_trials(one)]
            runs += self.seed_runs(one)
        # All variants of one seed before the next: what is there at any time can be compared.
        tasks += sorted(runs, key=lambda run: run.seed)
        return [task for task in tasks if self.result(task) is None]

    def result(self, task: Task) -> dict[str, Any] | None:
        """A task's result; ``None`` while it is not done."""
        return self.store.read(task.cached)

    def trials(self, one: VariantSearch) -> Results:
        """The finished trials of one setting."""
        keys = itertools.product(one.search.possible_points(), one.search.rungs)
        values = {key: self.result(self.trial(one.setting, *key)) for key in keys}
        return {key: _as_trial(value, *key) for key, value in values.items() if value is not None}

    def winner(self, one: VariantSearch) -> Point | None:
        """The chosen rate of one setting; ``None`` while it is unknown, or if every trial failed.

        One rate alone is chosen without a trial, except where the search is all that is wanted.
        """
        if self._is_given(one):
            return one.search.only_point
        return one.search.winner(self.trials(one))

    def _is_given(self, one: VariantSearch) -> bool:
        return bool(self.seeds) and one.search.only_point is not None

    def _open_trials(self, one: VariantSearch) -> list[tuple[Point, int]]:
        return [] if self._is_given(one) else one.search.open_trials(self.trials(one))

    def seed_runs(self, one: VariantSearch) -> list[Task]:
        """The final trainings of one setting; none before its rate is chosen."""
        point = self.winner(one)
        if point is None:
            return []
        return [self.seed_run(one.setting, point, seed) for seed in self.seeds]

    def count(self) -> int:
        """Tasks in all, if none fails."""
        total = len(self._fixed())
        for one in self.searches:
            points = len(one.search.points)
            for _ in () if self._is_given(one) else one.search.rungs:
                total, points = total + points, -(-points // 2)
            total += len(self.seeds)
        return total

    def left(self) -> int:
        """Tasks to do, as far as can be told: a search may still grow."""
        searching = sum(bool(self._open_trials(one)) for one in self.searches)
        return len(self.open_tasks()) + searching * len(self.seeds)

    def base(self) -> Task:
        """Scoring the base model."""
        return Task(CachedResult("base", "", "scores", self._key("base")))

    def costs(self, setting: Setting) -> Task:
        """Counting what a setting costs."""
        key = self._key("costs", *_decisive(setting, setting.config))
        return Task(CachedResult("costs", setting.label, "costs", key), setting)

    def trial(self, setting: Setting, point: Point, steps: int) -> Task:
        """One trial of a search."""
        config = point.applied(setting.config)
        key = self._key("trial", *_decisive(setting, config), steps)
        name = f"{steps}-steps-{point.lr:g}"
        return Task(CachedResult("trials", setting.label, name, key), setting, point, steps)

    def seed_run(self, setting: Setting, point: Point, seed: int) -> Task:
        """One final training."""
        config = point.applied(setting.config)
        key = self._key("member", *_decisive(setting, config), seed)
        cached = CachedResult("members", setting.label, f"seed-{seed}", key)
        return Task(cached, setting, point, seed=seed)

    def _fixed(self) -> list[Task]:
        """Tasks that no other decides; a search alone needs none of them."""
        if not self.seeds:
            return []
        return [self.base(), *(self.costs(one.setting) for one in self.searches)]

    def _key(self, *parts: Any) -> str:
        return fingerprint([self.shared, *parts])


def _decisive(setting: Setting, config: AdapterConfig) -> list[dict[str, Any]]:
    """What of a setting decides its results, beside what all of them share."""
    return [to_plain(config), *filter(None, [dict(setting.changes)])]


def _as_trial(value: dict[str, Any], point: Point, steps: int) -> Trial:
    """A trial's result, or the failed trial that a dead process left."""
    reason = value.get(FAILED)
    if reason is not None:
        return Trial(lr=point.lr, lr_ratio=point.ratio, steps=steps, loss=None, reason=reason)
    return build(Trial, value)
