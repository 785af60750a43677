"""Intervals against closed forms, coverage by simulation, Holm by hand."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from loratune.compare.statistics import Scores, holm, interval, over_seeds, share_interval

T_975 = {1: 12.7062, 2: 4.30265, 4: 2.77645}
"""Upper 2.5 % points of Student's t by degrees of freedom, from tables."""


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.1, 0.4, 0.2], [3.0, 3.5, 2.5, 4.0, 3.2]])
def test_seeds_alone_give_students_interval(values: list[float]) -> None:
    found = over_seeds(values, resamples=200_000)
    half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.low is not None and found.high is not None
    assert found.high - found.mean == pytest.approx(half, rel=0.05)
    assert found.mean - found.low == pytest.approx(half, rel=0.05)


def test_prompts_alone_give_the_normal_interval_of_a_mean() -> None:
    draw = random.Random(0)
    values = [draw.gauss(5, 2) for _ in range(400)]
    found = interval(Scores([values], [1.0] * 400))
    half = 1.96 * statistics.pstdev(values) / math.sqrt(400)
    assert found.low == pytest.approx(found.mean - half, abs=0.05 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.05 * half)


def test_the_mean_weighs_every_token_the_same() -> None:
    found = interval(Scores([[2.0, 30.0], [4.0, 60.0]], [1.0, 10.0]))
    assert found.mean == pytest.approx((2 + 30 + 4 + 60) / (2 * 11))


def test_a_ratio_with_equal_ratios_has_no_spread_however_long_its_units_are() -> None:
    weights = [1.0, 5.0, 20.0, 3.0]
    found = interval(Scores([[0.5 * weight for weight in weights]], weights))
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.5)


@pytest.mark.parametrize(("seed_spread", "prompt_spread"), [(0.0, 1.0), (0.3, 1.0), (1.0, 0.1)])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(
    seed_spread: float, prompt_spread: float
) -> None:
    """3 seeds, 40 prompts, true mean 0: 95 % promised."""
    draw = random.Random(1)
    covered, trials = 0, 300
    for trial in range(trials):
        prompts = [draw.gauss(0, prompt_spread) for _ in range(40)]
        seeds = [draw.gauss(0, seed_spread) for _ in range(3)]
        sums = [[s + p + draw.gauss(0, 0.2) for p in prompts] for s in seeds]
        found = interval(Scores(sums, [1.0] * 40), resamples=1000, seed=trial)
        assert found.low is not None and found.high is not None
        covered += found.low <= 0 <= found.high
    # 300 trials at 95 % have a standard error of 1.3 points; the interval may be a little wide.
    assert 0.915 <= covered / trials <= 1.0


def test_pairing_takes_out_what_both_share() -> None:
    draw = random.Random(2)
    hard = [draw.gauss(0, 10) for _ in range(50)]
    first = Scores([[h + 0.1 + draw.gauss(0, 0.05) for h in hard] for _ in range(3)], [1.0] * 50)
    second = Scores([[h + draw.gauss(0, 0.05) for h in hard] for _ in range(3)], [1.0] * 50)
    found = interval(first.minus(second))
    assert found.low is not None and found.low > 0
    assert found.p is not None and found.p < 0.05
    assert found.mean == pytest.approx(0.1, abs=0.05)


def test_scores_of_other_units_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="same seeds and units"):
        Scores([[1.0]], [1.0]).minus(Scores([[1.0]], [2.0]))
    with pytest.raises(ValueError, match="same seeds and units"):
        Scores([[1.0]], [1.0]).minus(Scores([[1.0], [1.0]], [1.0]))


def test_one_seed_and_one_unit_have_no_interval() -> None:
    found = over_seeds([3.0])
    assert (found.mean, found.low, found.high, found.p) == (3.0, None, None, None)


def test_no_p_value_is_zero() -> None:
    found = interval(Scores([[5.0] * 30, [5.1] * 30, [4.9] * 30], [1.0] * 30))
    assert found.p is not None and 0 < found.p < 0.05


def test_equal_scores_are_not_significant() -> None:
    found = interval(Scores([[0.0] * 20] * 3, [1.0] * 20))
    assert found.p == 1.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.5], [0.5]),
        ([0.9, 0.8], [1.0, 1.0]),
        ([], []),
        ([0.02, 0.02], [0.04, 0.04]),
    ],
)
def test_holm_steps_down_and_never_falls(given: list[float], expected: list[float]) -> None:
    assert holm(given) == pytest.approx(expected)


def test_the_same_scores_give_the_same_interval_twice() -> None:
    scores = Scores([[1.0, 2.0, 4.0], [2.0, 2.0, 5.0]], [1.0, 2.0, 1.0])
    assert interval(scores) == interval(scores)


def test_a_shares_interval_agrees_with_its_definition() -> None:
    """Wilson's bounds are where |p̂ − p| = z √(p (1 − p) / n)."""
    for hits, trials in [(36, 48), (1, 7), (240, 300)]:
        share = hits / trials
        for bound in share_interval(hits, trials):
            distance = 1.959964 * math.sqrt(bound * (1 - bound) / trials)
            assert abs(share - bound) == pytest.approx(distance, rel=1e-5)
    assert share_interval(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert share_interval(10, 10)[1] == pytest.approx(1, abs=1e-12)


def student_cdf(t: float, degrees: int) -> float:
    """Student's distribution in closed form, for 1, 2 and 4 degrees of freedom."""
    if degrees == 1:
        return 0.5 + math.atan(t) / math.pi
    if degrees == 2:
        return 0.5 + t / (2 * math.sqrt(2 + t * t))
    x = t * t / 4
    return 0.5 + 0.375 * t / math.sqrt(1 + x) * (1 - x / (3 * (1 + x)))


@pytest.mark.parametrize("degrees", [1, 2, 4])
def test_the_closed_forms_here_agree_with_the_tables(degrees: int) -> None:
    assert student_cdf(T_975[degrees], degrees) == pytest.approx(0.975, abs=1e-4)


@pytest.mark.parametrize("values", [[0.1, 0.3], [0.1, 0.4, -0.2], [0.3, 0.35, 0.2, 0.1, -0.32]])
@pytest.mark.parametrize("margin", [0.1, 0.5, 2.0])
def test_two_one_sided_tests_give_students_p_value(values: list[float], margin: float) -> None:
    """P(T >= (margin ∓ mean) / standard error), the larger of both."""
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    scores = Scores([[value] for value in values], [1.0])
    found = interval(scores, margin=margin, resamples=200_000).p_equivalence
    degrees = len(values) - 1
    sides = [1 - student_cdf((margin - side * mean) / error, degrees) for side in (1, -1)]
    assert found == pytest.approx(max(sides), abs=0.005)


def test_equivalence_is_the_ninety_percent_interval_within_the_margin() -> None:
    """Two one-sided tests at 5 % hold exactly where the 90 % interval lies inside."""
    draw = random.Random(3)
    scores = Scores([[draw.gauss(0.02, 0.3) for _ in range(200)] for _ in range(3)], [1.0] * 200)
    p = {margin: interval(scores, margin=margin).p_equivalence or 0.0 for margin in (0.02, 0.2)}
    assert p[0.02] > 0.05 > p[0.2]
    assert interval(scores).p_equivalence is None


def test_unequal_ones_are_seldom_taken_for_equal() -> None:
    """At a true difference of exactly the margin, "equivalent" is wrong 5 % of the time."""
    draw = random.Random(4)
    wrong, trials = 0, 300
    for trial in range(trials):
        seeds = [draw.gauss(0.3, 0.1) for _ in range(4)]
        sums = [[s + draw.gauss(0, 0.1) for _ in range(30)] for s in seeds]
        found = interval(Scores(sums, [1.0] * 30), margin=0.3, resamples=1000, seed=trial)
        wrong += (found.p_equivalence or 0.0) < 0.05
    assert wrong / trials < 0.085  # 5 % and 2.8 standard errors of 300 trials


def test_the_mean_of_every_seed_is_kept() -> None:
    assert Scores([[2.0, 30.0], [4.0, 7.0]], [1.0, 10.0]).seed_means().tolist() == pytest.approx(
        [32 / 11, 1.0]
    )
