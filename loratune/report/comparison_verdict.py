"""Which variant to choose, and how sure that is: the answer of a comparison in words."""

from __future__ import annotations

from dataclasses import dataclass

from loratune.compare.result import Comparison, Difference, VariantResult
from loratune.report.numbers import byte_size, significant

FEW_SEEDS = 3
FEW_PROMPTS = 50


@dataclass(frozen=True)
class Verdict:
    """What a comparison says.

    Attributes:
        best: label of the lowest mean loss; ``None`` if nothing was measured.
        tied: labels that the test does not tell from it, cheapest first.
        worse: labels that are significantly worse than it.
        choice: the one to choose: the cheapest among the best and the tied.
        sentences: the answer.
        cautions: what weakens it.
    """

    best: str | None
    tied: tuple[str, ...]
    worse: tuple[str, ...]
    choice: str | None
    sentences: tuple[str, ...]
    cautions: tuple[str, ...]


def loss_of(variant: VariantResult) -> float | None:
    """Its mean loss on the final rows."""
    estimate = variant.estimates.get("loss")
    return None if estimate is None else estimate.mean


def ranked(comparison: Comparison) -> list[VariantResult]:
    """The variants that have a loss, the lowest first."""
    measured = [variant for variant in comparison.variants if loss_of(variant) is not None]
    return sorted(measured, key=lambda variant: loss_of(variant) or 0.0)


def difference(comparison: Comparison, one: str, other: str, metric: str) -> Difference | None:
    """The test of two variants in one metric, whichever came first."""
    pair = {one, other}
    found = (d for d in comparison.differences if d.metric == metric)
    return next((d for d in found if {d.first, d.second} == pair), None)


def verdict(comparison: Comparison) -> Verdict:
    """Judge by loss on the final rows; among equals by what the adapter stores and optimizes."""
    order = ranked(comparison)
    if not order:
        sentence = "No variant finished, so there is nothing to choose between."
        return Verdict(None, (), (), None, (sentence,), tuple(_failures(comparison)))
    best = order[0]
    tests = {v.label: difference(comparison, best.label, v.label, "loss") for v in order[1:]}
    worse = [label for label, test in tests.items() if test is not None and test.significant]
    equal = [v for v in order if v.label not in worse]
    choice = min(equal, key=_cost)
    tied = tuple(v.label for v in sorted(equal, key=_cost) if v.label != best.label)
    untested = [label for label, test in tests.items() if test is None]
    sentences = [_choice_sentence(best, choice, tied)]
    sentences += _unseen_sentences(comparison, best, choice)
    sentences += _worse_sentences(comparison, best, worse)
    sentences += _exact_match_sentences(comparison, choice)
    if comparison.base.loss is not None:
        sentences.append(f"The base without any adapter: {significant(comparison.base.loss)}.")
    return Verdict(
        best.label, tied, tuple(worse), choice.label, tuple(sentences),
        tuple(_cautions(comparison, untested)),
    )  # fmt: skip


def _cost(variant: VariantResult) -> tuple[int, float]:
    costs = variant.costs
    return costs.stored_bytes + costs.optimizer_bytes, loss_of(variant) or 0.0


def _loss_words(variant: VariantResult) -> str:
    estimate = variant.estimates["loss"]
    words = f"{significant(estimate.mean)} nats per token"
    if estimate.low is not None and estimate.high is not None:
        bounds = f"{significant(estimate.low)} to {significant(estimate.high)}"
        words += f" (95 % interval {bounds})"
    return words


def _choice_sentence(best: VariantResult, choice: VariantResult, tied: tuple[str, ...]) -> str:
    if not tied:
        return f"Choose {best.label}: it has the lowest loss, {_loss_words(best)}."
    lowest = f"{best.label} has the lowest loss, {_loss_words(best)}"
    others = _listed(tied)
    verb = "is" if len(tied) == 1 else "are"
    small = (
        f"{byte_size(choice.costs.stored_bytes)} stored, {byte_size(choice.costs.optimizer_bytes)}"
    )
    cheapest = f"the cheapest of them ({small} of optimizer state)"
    same = f"{others} {verb} not significantly different from it"
    return f"Choose {choice.label}: {lowest}; {same}, and {choice.label} is {cheapest}."


def _unseen_sentences(
    comparison: Comparison, best: VariantResult, choice: VariantResult
) -> list[str]:
    """How much worse the choice may be although no difference was found."""
    test = difference(comparison, best.label, choice.label, "loss")
    if test is None:
        return []
    most = test.high if test.first == choice.label else -test.low
    return [
        f"That no difference was found does not prove that there is none: the 95 % interval allows "
        f"{choice.label} up to {significant(max(most, 0.0), 2)} nats per token more loss."
    ]


def _worse_sentences(comparison: Comparison, best: VariantResult, worse: list[str]) -> list[str]:
    sentences = []
    for label in worse:
        test = difference(comparison, best.label, label, "loss")
        assert test is not None
        low, high = test.low, test.high
        if test.first == best.label:
            low, high = -high, -low
        sentences.append(
            f"{label} is significantly worse than {best.label}, by "
            f"{significant(abs(test.difference), 3)} nats per token (95 % interval "
            f"{significant(low, 3)} to {significant(high, 3)}, p = {significant(test.p_holm, 2)} "
            "after Holm's correction)."
        )
    return sentences


def _exact_match_sentences(comparison: Comparison, choice: VariantResult) -> list[str]:
    better = []
    for other in comparison.variants:
        test = difference(comparison, choice.label, other.label, "exact_match")
        if test is None or not test.significant:
            continue
        gain = test.difference if test.first == other.label else -test.difference
        if gain > 0:
            better.append(f"{other.label} ({gain:+.1%})")
    if not better:
        return []
    return [f"By exact match, though, significantly better than {choice.label}: {_listed(better)}."]


def _cautions(comparison: Comparison, untested: list[str]) -> list[str]:
    cautions = _failures(comparison)
    seeds, prompts = len(comparison.seeds), comparison.rows.prompts
    if seeds < FEW_SEEDS:
        cautions.append(
            f"Only {seeds} seed{'s' * (seeds != 1)}: luck of initialisation and order is not "
            "averaged out. Use at least three."
        )
    if 0 < prompts < FEW_PROMPTS:
        cautions.append(
            f"Only {prompts} prompts in the final rows: small differences cannot be seen."
        )
    if untested:
        cautions.append(f"Not tested against the best: {_listed(untested)}.")
    return cautions


def _failures(comparison: Comparison) -> list[str]:
    lines = []
    for variant in comparison.variants:
        if variant.reason:
            lines.append(f"{variant.label} failed and is left out: {variant.reason}.")
        failed = [member for member in variant.members if member.reason]
        for member in failed if not variant.reason else []:
            lines.append(f"{variant.label}, seed {member.seed} failed: {member.reason}.")
    return lines


def _listed(names: list[str] | tuple[str, ...]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
