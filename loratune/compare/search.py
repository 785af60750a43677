"""Successive halving on a logarithmic grid: what to try next, as a function of what was tried.

Every trial is a short training of its own, with its whole schedule: a rate that wins a rung does
so at the end of a decay, as it will in the end.  Nothing but the results decides what comes next,
so a search can stop anywhere, and any number of processes can share it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratune.adapters.config import AdapterConfig
from loratune.compare.result import Trial
from loratune.errors import ConfigError

SHORTEST_RUNG = 5
"""Fewer steps than this say nothing about a rate."""
EXTENSIONS = 3
"""Rates tried beyond the grid at most."""


@dataclass(frozen=True, slots=True)
class Point:
    """One candidate.

    Attributes:
        lr: learning rate.
        ratio: value of the setting that the variant searches beside it, if it has one.
    """

    lr: float
    ratio: float | None = None

    def applied(self, config: AdapterConfig) -> AdapterConfig:
        """``config`` with this point's values."""
        changes: dict[str, Any] = {"lr": self.lr}
        if self.ratio is not None:
            changes[search_axis(config)] = self.ratio
        return replace(config, **changes)


def search_axis(config: AdapterConfig) -> str:
    """Name of the setting that a variant searches beside the learning rate; empty if none."""
    return next(iter(config.search_axes()), "")


Results = Mapping[tuple[Point, int], Trial]
"""Finished trials by point and number of steps."""


@dataclass(frozen=True)
class Search:
    """The search of one setting.

    Attributes:
        points: the grid.
        rungs: steps of each round, ascending; the last is the full length.
        factor: by which the grid grows while its edge is best; ``None`` keeps it as it is.
    """

    points: tuple[Point, ...]
    rungs: tuple[int, ...]
    factor: float | None = None

    @property
    def only_point(self) -> Point | None:
        """The point of a search that has nothing to choose; ``None`` for every other."""
        return self.points[0] if len(self.points) == 1 and self.factor is None else None

    def possible_points(self) -> list[Point]:
        """Every point that the search may come to try."""
        found = list(self.points)
        for ratio in {point.ratio for point in self.points} if self.factor else ():
            rates = [point.lr for point in self.points if point.ratio == ratio]
            for _ in range(EXTENSIONS):
                rates = [self._beyond(min(rates), -1), *rates, self._beyond(max(rates), 1)]
            found += [Point(rate, ratio) for rate in rates]
        return list(dict.fromkeys(found))

    def open_trials(self, results: Results) -> list[tuple[Point, int]]:
        """Trials that can run now; empty when the search is over, or waits for nothing."""
        for points, steps in self._rounds(results):
            missing = [(point, steps) for point in points if (point, steps) not in results]
            if missing:
                return missing
        beyond = self._extended(results)[1]
        return [(beyond, self.rungs[-1])] if beyond is not None else []

    def winner(self, results: Results) -> Point | None:
        """The best point of the last rung; ``None`` while unknown, or if every point failed."""
        if self.open_trials(results):
            return None
        return self._extended(results)[0]

    def is_at_edge(self, point: Point, results: Results) -> bool:
        """Whether a point has the lowest or highest rate tried: a better one may lie beyond."""
        rates = {other.lr for other, _ in results if other.ratio == point.ratio}
        return len(rates) > 1 and point.lr in (min(rates), max(rates))

    def _extended(self, results: Results) -> tuple[Point | None, Point | None]:
        """The best point of the last rung, and the one beyond the grid to try next, if any.

        A best rate at the grid's edge would be the grid's merit, not the variant's.
        """
        points, steps = self._rounds(results)[-1]
        best = next(iter(_ranked(points, steps, results)), None)
        tried = {point.lr for point in self.points if best and point.ratio == best.ratio}
        for _ in range(EXTENSIONS):
            if best is None or self.factor is None or best.lr not in (min(tried), max(tried)):
                break
            beyond = Point(self._beyond(best.lr, 1 if best.lr == max(tried) else -1), best.ratio)
            if (beyond, steps) not in results:
                return best, beyond
            tried.add(beyond.lr)
            best = _ranked([best, beyond], steps, results)[0]
        return best, None

    def _beyond(self, rate: float, way: int) -> float:
        assert self.factor is not None
        return _rounded(rate * self.factor**way)

    def _rounds(self, results: Results) -> list[tuple[list[Point], int]]:
        """Every round whose field is known: all points, then the better half of each round."""
        rounds: list[tuple[list[Point], int]] = []
        field = list(self.points)
        for steps in self.rungs:
            rounds.append((field, steps))
            if any((point, steps) not in results for point in field):
                break
            field = _ranked(field, steps, results)[: math.ceil(len(field) / 2)]
        return rounds


def _ranked(points: Sequence[Point], steps: int, results: Results) -> list[Point]:
    """The points that did not fail, best first; of equals the lower rate."""
    losses = {point: results[point, steps].loss for point in points}
    usable = [(loss, point.lr, point) for point, loss in losses.items() if loss is not None]
    return [point for _, _, point in sorted(usable, key=lambda item: item[:2])]


def plan_search(
    own_rate: float,
    steps: int,
    *,
    points: int,
    factor: float,
    rungs: int,
    grid: Sequence[float] | None = None,
    ratios: Sequence[float | None] = (None,),
) -> Search:
    """The grid and the rounds of one setting.

    Args:
        own_rate: the setting's usual rate, the middle of its grid.
        steps: of the last round.
        points: rates to try.
        factor: between neighbouring rates.
        rungs: rounds, each with twice the steps of the one before.
        grid: rates to try instead of those around ``own_rate``.
        ratios: values of the second setting, each tried with every rate.

    Raises:
        ConfigError: if no rate of the grid is a positive number.
    """
    middle = (points - 1) // 2
    rates = (
        [own_rate * factor ** (place - middle) for place in range(points)]
        if grid is None
        else sorted(set(grid))
    )
    usable = [_rounded(rate) for rate in rates if math.isfinite(rate) and rate > 0]
    if not usable or len(usable) < len(rates):
        raise ConfigError(
            f"{list(rates)} are not all positive rates" if rates else "no learning rate is left",
            where="lr_grid",
            fix="give rates above 0, for example lr_grid=[1e-4,3e-4,1e-3]",
        )
    single = len(usable) * len(ratios) == 1
    lengths = [steps] if single else [max(1, steps >> place) for place in reversed(range(rungs))]
    kept = sorted({max(length, min(SHORTEST_RUNG, steps)) for length in lengths})
    found = tuple(Point(rate, ratio) for ratio in ratios for rate in usable)
    grows = grid is None and points > 1
    return Search(found, tuple(kept), factor if grows else None)


def _rounded(rate: float) -> float:
    """Four digits: what is shown is what was used."""
    return float(f"{rate:.4g}")
