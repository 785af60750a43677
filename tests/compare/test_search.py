"""Successive halving against a known loss."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest

from loratune.adapters.lora_plus.config import LoRAPlusConfig
from loratune.compare.result import Trial
from loratune.compare.search import EXTENSIONS, Point, Search, plan_search
from loratune.errors import ConfigError

Loss = Callable[[Point, int], float | None]
Done = dict[tuple[Point, int], Trial]


def valley(best: float) -> Loss:
    """A loss with its minimum at the rate ``best``, lower with more steps."""
    return lambda point, steps: abs(math.log(point.lr / best)) + 1 / steps


def run(search: Search, loss: Loss, draw: random.Random | None = None) -> Done:
    """Carry a search out, in the given order or in a random one."""
    done: Done = {}
    while trials := search.open_trials(done):
        point, steps = draw.choice(trials) if draw else trials[0]
        found = loss(point, steps)
        reason = "" if found is not None else "diverged"
        done[point, steps] = Trial(
            lr=point.lr, lr_ratio=point.ratio, steps=steps, loss=found, reason=reason
        )
    return done


def grid(points: int = 7, steps: int = 40, rungs: int = 3) -> Search:
    return plan_search(1e-3, steps, points=points, factor=2.0, rungs=rungs)


def test_the_grid_is_logarithmic_around_the_own_rate() -> None:
    rates = [point.lr for point in grid(points=5).points]
    assert rates == pytest.approx([2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3])


def test_every_rung_has_twice_the_steps_and_half_the_rates() -> None:
    search = grid()
    done = run(search, valley(1e-3))
    assert search.rungs == (10, 20, 40)
    assert Counter(steps for _, steps in done) == {10: 7, 20: 4, 40: 2}


@pytest.mark.parametrize("place", range(1, 6))
def test_the_best_rate_of_a_smooth_valley_wins(place: int) -> None:
    search = grid()
    best = search.points[place]
    assert search.winner(run(search, valley(best.lr))) == best


def test_no_winner_is_named_before_the_search_is_over() -> None:
    search = grid()
    done = run(search, valley(1e-3))
    for missing in done:
        rest = {key: trial for key, trial in done.items() if key != missing}
        assert search.winner(rest) is None
        assert search.open_trials(rest)[0] == missing


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_trials_does_not_matter(seed: int) -> None:
    search = grid()
    in_order = run(search, valley(3e-3))
    shuffled = run(search, valley(3e-3), random.Random(seed))
    assert shuffled == in_order


def test_a_rate_that_diverges_never_wins() -> None:
    def loss(point: Point, steps: int) -> float | None:
        return None if point.lr > 1.5e-3 else valley(8e-3)(point, steps)

    search = grid()
    assert search.winner(run(search, loss)) == Point(1e-3)


def test_a_grid_whose_rates_all_diverge_ends_without_a_winner() -> None:
    search = grid()
    done = run(search, lambda point, steps: None)
    assert len(done) == 7
    assert search.open_trials(done) == []
    assert search.winner(done) is None


def test_the_grid_grows_while_its_edge_is_best() -> None:
    search = grid()
    done = run(search, valley(1.6e-2))
    found = search.winner(done)
    assert found is not None and found.lr == pytest.approx(1.6e-2)
    assert not search.is_at_edge(found, done)


def test_the_grid_stops_growing_and_says_that_it_did() -> None:
    search = grid()
    done = run(search, lambda point, steps: -point.lr)
    found = search.winner(done)
    assert found is not None
    assert found.lr == pytest.approx(8e-3 * 2**EXTENSIONS)
    assert search.is_at_edge(found, done)
    assert {point for point, _ in done} <= set(search.possible_points())


def test_a_grid_that_the_user_gave_stays_as_it_is() -> None:
    search = plan_search(1.0, 40, points=7, factor=2.0, rungs=2, grid=[1e-3, 1e-4])
    done = run(search, lambda point, steps: -point.lr)
    assert {point.lr for point, _ in done} == {1e-4, 1e-3}
    winner = search.winner(done)
    assert winner == Point(1e-3)
    assert search.is_at_edge(Point(1e-3), done)


def test_ratios_are_tried_with_every_rate() -> None:
    search = plan_search(1e-3, 40, points=3, factor=2.0, rungs=2, ratios=[4.0, 16.0])
    assert len(search.points) == 6
    winner = search.winner(run(search, lambda p, steps: valley(1e-3)(p, steps) + (p.ratio or 0)))
    assert winner == Point(1e-3, 4.0)


def test_one_rate_needs_no_rungs() -> None:
    assert plan_search(1e-3, 40, points=1, factor=2.0, rungs=3).rungs == (40,)


def test_rungs_are_never_too_short_to_mean_anything() -> None:
    assert grid(steps=8).rungs == (5, 8)
    assert grid(steps=3).rungs == (3,)


@pytest.mark.parametrize("rates", [[], [0.0], [-1e-3], [1e-3, 0.0], [math.nan], [math.inf]])
def test_a_grid_without_a_usable_rate_is_refused(rates: list[float]) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_search(1e-3, 40, points=3, factor=2.0, rungs=1, grid=rates)
    assert refused.value.exit_code == 2
    assert refused.value.where == "lr_grid"


def test_a_point_sets_rate_and_ratio_and_nothing_else() -> None:
    before = LoRAPlusConfig(rank=4, alpha=8.0)
    after = Point(3e-3, 4.0).applied(before)
    assert after == LoRAPlusConfig(rank=4, alpha=8.0, lr=3e-3, lr_ratio=4.0)
    assert before.lr != after.lr
