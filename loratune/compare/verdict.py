"""Which variant to choose, and how sure that is: one answer for terminal, files and page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from loratune.compare.metrics import possible_interval
from loratune.compare.result import Comparison, Difference, Twin, VariantResult
from loratune.units import byte_size, significant

FEW_SEEDS = 3
FEW_PROMPTS = 100
"""Below this one prompt is a point or more."""
SATURATED = 0.02
"""Exact match this close to none or all tells nothing apart."""


@dataclass(frozen=True)
class Choice:
    """A comparison's loss on the final rows, judged.

    Attributes:
        best: the lowest mean loss.
        chosen: the cheapest of the best and those that are as good.
        margin: nats per token that "as good" allows.
        as_good: variants that the 95 % interval shows to be within ``margin`` of the best.
        undecided: no significant difference, yet the interval reaches beyond ``margin``.
        worse: significantly worse than the best, and not shown to be within ``margin``.
    """

    best: VariantResult
    chosen: VariantResult
    margin: float
    as_good: tuple[VariantResult, ...]
    undecided: tuple[VariantResult, ...]
    worse: tuple[VariantResult, ...]


@dataclass(frozen=True)
class Verdict:
    """What a comparison says.

    Attributes:
        choice: ``None`` if nothing was measured.
        sentences: the answer.
        cautions: what weakens it.
    """

    choice: Choice | None
    sentences: tuple[str, ...]
    cautions: tuple[str, ...]

    @property
    def findings(self) -> list[str]:
        """The answer, then what weakens it."""
        return [*self.sentences, *self.cautions]


def verdict(comparison: Comparison) -> Verdict:
    """The choice in sentences, and what weakens it."""
    choice = choose(comparison)
    return Verdict(choice, tuple(_answer(comparison, choice)), tuple(_cautions(comparison, choice)))


# -- the judgement -------------------------------------------------------------------------


def choose(comparison: Comparison) -> Choice | None:
    """Judge by loss; among equals by what the adapter stores and optimizes.

    "No significant difference" does not prove equality: with few seeds every interval is wide.
    So a cheaper variant is chosen only if its interval shows that it keeps the gain but for the
    comparison's margin.  ``None`` if nothing was measured.
    """
    measured = [variant for variant in comparison.variants if "loss" in variant.estimates]
    if not measured:
        return None
    best, *others = sorted(measured, key=lambda variant: variant.estimates["loss"].mean)
    margin = comparison.margin * _gain(comparison, best)
    as_good, undecided, worse = [], [], []
    for variant in sorted(others, key=_cost):
        test = difference(comparison, best.label, variant.label, "loss")
        if test is not None and _most_lost(test, variant.label) <= margin:
            as_good.append(variant)
        elif test is not None and test.significant:
            worse.append(variant)
        else:
            undecided.append(variant)
    chosen = min([best, *as_good], key=_cost)
    return Choice(best, chosen, margin, tuple(as_good), tuple(undecided), tuple(worse))


def _gain(comparison: Comparison, best: VariantResult) -> float:
    loss = best.estimates["loss"].mean
    return loss if comparison.base.loss is None else comparison.base.loss - loss


def _cost(variant: VariantResult) -> tuple[int, float]:
    """Bytes in the file and in the optimizer; the loss decides between equals."""
    costs = variant.costs
    return costs.stored_bytes + costs.optimizer_bytes, variant.estimates["loss"].mean


def difference(comparison: Comparison, one: str, other: str, metric: str) -> Difference | None:
    """The test of two variants in one metric, whichever came first."""
    tests = (test for test in comparison.differences if test.metric == metric)
    return next((test for test in tests if {test.first, test.second} == {one, other}), None)


def _most_lost(test: Difference, label: str) -> float:
    """The most that ``label`` may lose against the other of the pair, by the 95 % interval."""
    return max(0.0, test.high if test.first == label else -test.low)


# -- the answer ----------------------------------------------------------------------------


def _answer(comparison: Comparison, choice: Choice | None) -> Iterator[str]:
    if choice is None:
        yield "No variant finished, so there is nothing to choose between."
        return
    yield _choice_sentence(choice, 1 - comparison.margin)
    yield from _undecided_sentence(comparison, choice)
    yield from _worse_sentences(comparison, choice)
    yield from _exact_match_sentence(comparison, choice.chosen)
    if comparison.base.loss is not None:
        yield f"The base without any adapter: {significant(comparison.base.loss)}."


def _choice_sentence(choice: Choice, kept: float) -> str:
    best, chosen = choice.best, choice.chosen
    as_good = f"as good (by the 95 % interval, {100 * kept:.4g}% of what training gained is kept)"
    others = f"{_labels(choice.as_good)} {_verb(choice.as_good)} {as_good}"
    if chosen is best:
        text = f"Choose {best.label}: it has the lowest loss, {_loss(best)}"
        return f"{text}; {others}, but no cheaper." if choice.as_good else f"{text}."
    costs = chosen.costs
    return (
        f"Choose {chosen.label}: {best.label} has the lowest loss, {_loss(best)}; {others}, and "
        f"{chosen.label} is the cheapest ({byte_size(costs.stored_bytes)} stored, "
        f"{byte_size(costs.optimizer_bytes)} of optimizer state)."
    )


def _loss(variant: VariantResult) -> str:
    estimate = variant.estimates["loss"]
    words = f"{significant(estimate.mean)} nats per token"
    if estimate.low is None or estimate.high is None:
        return words
    low, high = possible_interval("loss", estimate.low, estimate.high)
    return f"{words} (95 % interval {significant(low)} to {significant(high)})"


def _undecided_sentence(comparison: Comparison, choice: Choice) -> Iterator[str]:
    """How much worse each may be although no difference was found."""
    best = choice.best.label
    pairs = [(v, difference(comparison, best, v.label, "loss")) for v in choice.undecided]
    tested = [(variant, test) for variant, test in pairs if test is not None]
    if not tested:
        return
    most = [
        f"{v.label} may have up to {significant(_most_lost(test, v.label), 2)} nats per token more "
        "loss"
        for v, test in tested
    ]
    variants = [variant for variant, _ in tested]
    yield (
        f"{_labels(variants)} {_verb(variants)} not significantly different from {best}, which "
        f"does not prove that there is no difference: by the 95 % interval, {_listed(most)}. Rows "
        f"and seeds decide; as good would be {significant(choice.margin, 2)}."
    )


def _worse_sentences(comparison: Comparison, choice: Choice) -> Iterator[str]:
    best = choice.best.label
    for variant in choice.worse:
        test = difference(comparison, best, variant.label, "loss")
        assert test is not None
        low, high = (-test.high, -test.low) if test.first == best else (test.low, test.high)
        yield (
            f"{variant.label} is significantly worse than {best}, by "
            f"{significant(abs(test.difference), 3)} nats per token (95 % interval "
            f"{significant(low, 3)} to {significant(high, 3)}, p = {significant(test.p_holm, 2)} "
            "after Holm's correction)."
        )


def _exact_match_sentence(comparison: Comparison, chosen: VariantResult) -> Iterator[str]:
    better = []
    for other in comparison.variants:
        test = difference(comparison, chosen.label, other.label, "exact_match")
        if test is None or not test.significant:
            continue
        gain = test.difference if test.first == other.label else -test.difference
        if gain > 0:
            better.append(f"{other.label} ({gain:+.1%})")
    if better:
        others = _listed(better)
        yield f"By exact match, though, significantly better than {chosen.label}: {others}."


# -- what weakens it -----------------------------------------------------------------------


def _cautions(comparison: Comparison, choice: Choice | None) -> Iterator[str]:
    yield from _failures(comparison)
    yield from (f"{v.label}: {note}." for v in comparison.variants for note in v.notes)
    seeds, prompts = len(comparison.seeds), comparison.rows.prompts
    if seeds < FEW_SEEDS:
        yield (
            f"Only {seeds} seed{'s' * (seeds != 1)}: luck of initialisation and order is not "
            f"averaged out. Use at least {FEW_SEEDS} (seeds={FEW_SEEDS})."
        )
    if 0 < prompts < FEW_PROMPTS:
        yield f"Only {prompts} prompts in the final rows: small differences cannot be seen."
    yield from _saturation(comparison)
    yield from map(twin_in_words, comparison.twins)
    if choice is not None:
        best, undecided = choice.best.label, choice.undecided
        untested = [v for v in undecided if not difference(comparison, best, v.label, "loss")]
        if untested:
            yield f"Not tested against the best: {_labels(untested)}."
    yield from comparison.rows.notes


def twin_in_words(twin: Twin) -> str:
    """Which training a contender is, at which rate, and whether it was trained."""
    rate = "" if abs(twin.rate_factor - 1) < 1e-6 else f" at {twin.rate_factor:.4g} times its rate"
    same = f"the same training as {twin.of}{rate}"
    if twin.but:
        return f"{twin.label} would be {same}, but for {_listed(twin.but)}."
    if twin.trained:
        return f"{twin.label} is {same}: what differs between them is rounding."
    return (
        f"{twin.label} was not trained: up to rounding it is {same} "
        "(compare.train_twins=true trains it too)."
    )


def _saturation(comparison: Comparison) -> Iterator[str]:
    scores = [
        v.estimates["exact_match"].mean for v in comparison.variants if "exact_match" in v.estimates
    ]
    if len(scores) > 1 and (min(scores) > 1 - SATURATED or max(scores) < SATURATED):
        yield "Exact match is saturated here: only the loss can tell the variants apart."


def _failures(comparison: Comparison) -> Iterator[str]:
    for variant in comparison.variants:
        if variant.reason:
            yield f"{variant.label} failed and is left out: {variant.reason}."
            continue
        for run in filter(lambda run: run.reason, variant.members):
            yield (
                f"{variant.label}, seed {run.seed} failed: {run.reason}; its numbers come from "
                "the other seeds."
            )


def _labels(variants: Iterable[VariantResult]) -> str:
    return _listed([variant.label for variant in variants])


def _verb(variants: Iterable[VariantResult]) -> str:
    return "is" if len(list(variants)) == 1 else "are"


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
