"""What the study's claims come to: each is confirmed, refuted or left undecided by a comparison.

A recipe of recipes/study states its claims as comments, `# claim NAME: sentence`; the function of
that name in `TESTS` reads the comparison.  Nothing here knows a result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loratune.adapters.registry import config_class
from loratune.compare.result import Comparison, Difference, SeedRun, VariantResult
from loratune.compare.statistics import over_seeds
from loratune.units import significant

CONFIRMED, REFUTED, UNDECIDED = "confirmed", "refuted", "undecided"
_CLOSE = 0.02
"""Of the best one's gain over the base: what "within 1 to 2 %" allows at most."""
NO_RATES = "Fewer than two ranks have a usable rate."
_ROUNDING = 1e-4
"""Nats per token that fp32's rounding may add up to over a whole training."""


@dataclass(frozen=True)
class Verdict:
    """What a comparison says of a claim.

    Attributes:
        word: ``confirmed``, ``refuted`` or ``undecided``.
        evidence: the numbers behind it, in a sentence.
    """

    word: str
    evidence: str


def within_two_percent(comparison: Comparison) -> Verdict:
    """Whether all losses are full fine-tuning's within 2 % of the best one's gain."""
    gain = _gain(comparison)
    margin = _CLOSE * gain
    pairs = [
        _pair(comparison, one.label, "full") for one in _finished(comparison) if one.label != "full"
    ]
    found = [pair for pair in pairs if pair is not None]
    beyond = [pair for pair in found if min(abs(pair.low), abs(pair.high)) > margin and _told(pair)]
    inside = [pair for pair in found if max(abs(pair.low), abs(pair.high)) < margin]
    word = REFUTED if beyond else CONFIRMED if len(inside) == len(pairs) else UNDECIDED
    sentences = [
        f"{pair.first} {pair.difference / gain:+.1%} of the gain ({pair.low / gain:+.1%} to "
        f"{pair.high / gain:+.1%})"
        for pair in found
    ]
    named = f" Beyond 2 %: {', '.join(pair.first for pair in beyond)}." if beyond else ""
    return Verdict(word, f"Loss above full fine-tuning's: {'; '.join(sentences)}.{named}")


def rate_ten_times(comparison: Comparison) -> Verdict:
    """Whether LoRA's best rate is ten times full fine-tuning's, as far as the grid can tell."""
    lora, full = (_labelled(comparison, label).lr for label in ("lora", "full"))
    factor = float(comparison.recipe["compare"]["lr_factor"])
    if lora is None or full is None:
        return Verdict(UNDECIDED, "One of them had no usable rate.")
    ratio = lora / full
    steps_off = abs(math.log(ratio / 10, factor))
    word = CONFIRMED if steps_off <= 0.5 else UNDECIDED if steps_off < 1.5 else REFUTED
    evidence = (
        f"LoRA's {lora:g} is {significant(ratio)} times {full:g}; neighbouring rates of the grid "
        f"differ by {factor:g} times."
    )
    return Verdict(word, evidence)


def half_the_steps(comparison: Comparison) -> Verdict:
    """Whether LoRA+ reaches the target loss in half of LoRA's steps."""
    return _fewer_steps(comparison, "lora_plus", 0.5)


def fifth_fewer_steps(comparison: Comparison) -> Verdict:
    """Whether LoRA-FA reaches the target loss in at most four fifths of LoRA's steps."""
    return _fewer_steps(comparison, "lora_fa", 0.8)


def forgets_less(comparison: Comparison) -> Verdict:
    """Whether LoRA has forgotten less than full fine-tuning where both reach the target loss."""
    pairs = _both(comparison, "lora", "full", lambda run: run.forgetting_at_target)
    if len(pairs) < 2:
        return Verdict(UNDECIDED, "Fewer than two seeds reached the target with both.")
    found = over_seeds([lora - full for lora, full in pairs])
    assert found.low is not None and found.high is not None
    word = CONFIRMED if found.high < 0 else REFUTED if found.low > 0 else UNDECIDED
    target = significant(comparison.target_loss)
    return Verdict(
        word,
        f"Where the dev loss reaches {target}, what LoRA has forgotten less what full fine-tuning "
        f"has: {found.mean:+.4f} nats ({found.low:+.4f} to {found.high:+.4f}, {len(pairs)} seeds).",
    )


def tenth_of_the_numbers(comparison: Comparison) -> Verdict:
    """Whether VeRA reaches LoRA's loss with a tenth of its numbers."""
    return _as_good_with_a_tenth(comparison, "vera")


def ia3_is_enough(comparison: Comparison) -> Verdict:
    """Whether IA3 reaches LoRA's loss with a tenth of its numbers."""
    return _as_good_with_a_tenth(comparison, "ia3")


def dora_beats_lora(comparison: Comparison) -> Verdict:
    """Whether DoRA reaches a lower loss than LoRA at the same rank."""
    return _is_better(comparison, "dora", "lora")


def pissa_starts_faster(comparison: Comparison) -> Verdict:
    """Whether PiSSA reaches the target loss in fewer steps than LoRA."""
    return _fewer_steps(comparison, "pissa", 1.0)


def olora_starts_faster(comparison: Comparison) -> Verdict:
    """Whether OLoRA reaches the target loss in fewer steps than LoRA."""
    return _fewer_steps(comparison, "olora", 1.0)


def same_at_own_rates(comparison: Comparison) -> Verdict:
    """Whether rsLoRA is no better than LoRA once each has its own rate."""
    return _is_no_better(comparison, "rs64", "plain64")


def better_at_one_rate(comparison: Comparison) -> Verdict:
    """Whether rsLoRA is better than LoRA at the rate that both were published with."""
    return _is_better(comparison, "rs64_as_published", "plain64_as_published")


def mlp_beats_attention(comparison: Comparison) -> Verdict:
    """Whether the MLP's layers alone reach a lower loss than attention's alone."""
    return _is_better(comparison, "mlp", "attention")


def attention_adds_nothing(comparison: Comparison) -> Verdict:
    """Whether all layers are no better than the MLP's alone."""
    return _is_no_better(comparison, "everywhere", "mlp")


def one_rate_by_rank(comparison: Comparison) -> Verdict:
    """Whether the best rates of all ranks lie within one step of the grid at scale 32/r."""
    return _is_one_rate(comparison, lambda rank: 32 / rank)


def one_rate_by_root(comparison: Comparison) -> Verdict:
    """Whether the best rates of all ranks lie within one step of the grid at scale 8/√r."""
    return _is_one_rate(comparison, lambda rank: 8 / math.sqrt(rank))


def rate_falls_with_rank(comparison: Comparison) -> Verdict:
    """Whether the best rate falls with the rank at a scale that no rank changes."""
    rates = _rates_by_rank(comparison, lambda rank: 1.0)
    if len(rates) < 2:
        return Verdict(UNDECIDED, NO_RATES)
    values = [rates[rank] for rank in sorted(rates)]
    falls = all(b <= a for a, b in itertools.pairwise(values)) and values[-1] < values[0]
    return Verdict(CONFIRMED if falls else REFUTED, _rates_told(comparison, rates))


def differ_by_rounding(comparison: Comparison) -> Verdict:
    """Whether every pair of one training's names agrees within fp32's rounding, seed by seed."""
    apart: list[tuple[float, str]] = []
    for twin in comparison.twins:
        pairs = _both(comparison, twin.label, twin.of, lambda run: run.loss)
        apart += [(abs(a - b), f"{twin.label} and {twin.of}") for a, b in pairs]
    if not apart:
        return Verdict(UNDECIDED, "No pair was trained.")
    worst, names = max(apart)
    return Verdict(
        CONFIRMED if worst <= _ROUNDING else REFUTED,
        f"{len(comparison.twins)} pairs, each with {len(comparison.seeds)} seeds: test losses are "
        f"at most {worst:.1e} nats apart ({names}).",
    )


TESTS: dict[str, Callable[[Comparison], Verdict]] = {
    test.__name__: test
    for test in (
        within_two_percent,
        rate_ten_times,
        half_the_steps,
        fifth_fewer_steps,
        forgets_less,
        tenth_of_the_numbers,
        ia3_is_enough,
        dora_beats_lora,
        pissa_starts_faster,
        olora_starts_faster,
        same_at_own_rates,
        better_at_one_rate,
        mlp_beats_attention,
        attention_adds_nothing,
        one_rate_by_rank,
        one_rate_by_root,
        rate_falls_with_rank,
        differ_by_rounding,
    )
}


def _fewer_steps(comparison: Comparison, label: str, share: float) -> Verdict:
    """Whether a contender needs at most ``share`` of LoRA's steps to the target loss."""
    pairs = _both(comparison, label, "lora", lambda run: run.steps_to_target)
    if len(pairs) < 2:
        return Verdict(UNDECIDED, "Fewer than two seeds reached the target with both.")
    found = over_seeds([math.log(mine / lora) for mine, lora in pairs])
    assert found.low is not None and found.high is not None
    low, middle, high = (math.exp(value) for value in (found.low, found.mean, found.high))
    word = CONFIRMED if high <= share else REFUTED if low > share else UNDECIDED
    return Verdict(
        word,
        f"To dev loss {significant(comparison.target_loss)} it needs {middle:.2f} times LoRA's "
        f"steps ({low:.2f} to {high:.2f}, {len(pairs)} seeds).",
    )


def _as_good_with_a_tenth(comparison: Comparison, label: str) -> Verdict:
    lora, small = _labelled(comparison, "lora"), _labelled(comparison, label)
    ratio = lora.costs.trainable / small.costs.trainable
    pair = _pair(comparison, label, "lora")
    if pair is None:
        return Verdict(UNDECIDED, "One of them has no loss.")
    word = REFUTED if _told(pair) and pair.difference > 0 else UNDECIDED
    if ratio >= 10 and (pair.equivalent or (_told(pair) and pair.difference < 0)):
        word = CONFIRMED
    return Verdict(
        word, f"LoRA trains {significant(ratio)} times as many numbers. {_loss_words(pair)}"
    )


def _is_better(comparison: Comparison, first: str, second: str) -> Verdict:
    pair = _pair(comparison, first, second)
    if pair is None:
        return Verdict(UNDECIDED, "One of them has no loss.")
    is_known = pair.equivalent or (_told(pair) and pair.difference > 0)
    word = CONFIRMED if _told(pair) and pair.difference < 0 else REFUTED if is_known else UNDECIDED
    return Verdict(word, _loss_words(pair))


def _is_no_better(comparison: Comparison, first: str, second: str) -> Verdict:
    """Whether ``first`` is not better by more than the margin, be it as good or worse."""
    pair = _pair(comparison, first, second)
    if pair is None:
        return Verdict(UNDECIDED, "One of them has no loss.")
    is_better = _told(pair) and pair.difference < 0
    is_known = pair.margin is not None and pair.low > -pair.margin
    word = REFUTED if is_better else CONFIRMED if is_known else UNDECIDED
    if word != CONFIRMED:
        return Verdict(word, _loss_words(pair))
    most = f"{max(0.0, -pair.low):.4f} at most, less than the margin of {pair.margin:.4f}"
    return Verdict(word, f"{_loss_words(pair)} {first} is better by {most}.")


def _is_one_rate(comparison: Comparison, scale: Callable[[int], float]) -> Verdict:
    rates = _rates_by_rank(comparison, scale)
    if len(rates) < 2:
        return Verdict(UNDECIDED, NO_RATES)
    factor = float(comparison.recipe["compare"]["lr_factor"])
    is_one = max(rates.values()) <= min(rates.values()) * factor * 1.01
    return Verdict(CONFIRMED if is_one else REFUTED, _rates_told(comparison, rates))


def _rates_by_rank(comparison: Comparison, scale: Callable[[int], float]) -> dict[int, float]:
    """Rank to best rate of the contenders whose scale is that of ``scale``, ascending."""
    rates = {
        int(one.adapter["rank"]): one.lr
        for one in comparison.variants
        if one.lr is not None and math.isclose(_scaling(one), scale(int(one.adapter["rank"])))
    }
    return dict(sorted(rates.items()))


def _scaling(variant: VariantResult) -> float:
    """The factor on a contender's correction, as the variant itself computes it."""
    config = config_class(variant.variant)(**variant.adapter)
    return config.scaling(config.rank, config.alpha)


def _rates_told(comparison: Comparison, rates: dict[int, float]) -> str:
    factor = float(comparison.recipe["compare"]["lr_factor"])
    return (
        f"Best rates: {', '.join(f'rank {rank} {rate:g}' for rank, rate in rates.items())}; "
        f"neighbouring rates of the grid differ by {factor:g} times."
    )


def _finished(comparison: Comparison) -> list[VariantResult]:
    return [one for one in comparison.variants if "loss" in one.estimates]


def _labelled(comparison: Comparison, label: str) -> VariantResult:
    return next(one for one in comparison.variants if one.label == label)


def _gain(comparison: Comparison) -> float:
    """Nats per token that the best contender gained over the base."""
    best = min(one.estimates["loss"].mean for one in _finished(comparison))
    return (comparison.base.loss or 0.0) - best


def _pair(comparison: Comparison, first: str, second: str) -> Difference | None:
    """The losses' difference ``first`` minus ``second``, whichever way round it was computed."""
    for one in comparison.differences:
        if one.metric != "loss" or {one.first, one.second} != {first, second}:
            continue
        return one if one.first == first else _turned(one)
    return None


def _turned(one: Difference) -> Difference:
    """The same difference, ``second`` minus ``first``."""
    return replace(
        one,
        first=one.second,
        second=one.first,
        difference=-one.difference,
        low=-one.high,
        high=-one.low,
        by_seed=[-value for value in one.by_seed],
    )


def _told(pair: Difference) -> bool:
    """Whether a difference is shown, and is more than what counts as none."""
    return pair.significant and not pair.equivalent


def _both(
    comparison: Comparison, first: str, second: str, number: Callable[[SeedRun], float | None]
) -> Sequence[tuple[float, float]]:
    """A number of both contenders, for every seed where both have it."""
    by_label = {one.label: {run.seed: run for run in one.members} for one in comparison.variants}
    mine, other = by_label.get(first, {}), by_label.get(second, {})
    values = [(number(mine[seed]), number(other[seed])) for seed in mine if seed in other]
    return [(a, b) for a, b in values if a is not None and b is not None]


def _loss_words(pair: Difference) -> str:
    said = "significant" if pair.significant else "not significant"
    if pair.margin is not None and pair.equivalent:
        said += f"; equivalent within {pair.margin:.4f}"
    elif pair.margin is not None and not pair.significant:
        said += f"; not shown to be equivalent within {pair.margin:.4f}"
    return (
        f"{pair.first} - {pair.second}: {pair.difference:+.4f} nats per token "
        f"({pair.low:+.4f} to {pair.high:+.4f}), {said}."
    )
