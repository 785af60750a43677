"""Which variant to choose, and how sure that is: the answer of a comparison in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratune.compare.choice import KEPT_SHARE, Choice, choose, difference, most_lost
from loratune.compare.result import Comparison, VariantResult
from loratune.report.numbers import byte_size, significant

FEW_SEEDS = 3
FEW_PROMPTS = 50
_AS_GOOD = f"as good (by the 95 % interval, {KEPT_SHARE:.0%} of what training gained is kept)"


@dataclass(frozen=True)
class Verdict:
    """What a comparison says.

    Attributes:
        best: label of the lowest mean loss; ``None`` if nothing was measured.
        tied: labels that are as good, or that the test does not tell from it.
        worse: labels that are significantly worse than it.
        choice: the one to choose: the cheapest that is shown to be as good.
        sentences: the answer.
        cautions: what weakens it.
    """

    best: str | None
    tied: tuple[str, ...]
    worse: tuple[str, ...]
    choice: str | None
    sentences: tuple[str, ...]
    cautions: tuple[str, ...]


def verdict(comparison: Comparison) -> Verdict:
    """The choice in sentences, and what weakens it."""
    found = choose(comparison)
    if found is None:
        sentence = "No variant finished, so there is nothing to choose between."
        return Verdict(None, (), (), None, (sentence,), tuple(_failures(comparison)))
    best, chosen = found.best, found.chosen
    tied = _labels([*found.as_good, *found.undecided])
    worse = _labels(found.worse)
    untested = [
        label for label in tied if difference(comparison, best.label, label, "loss") is None
    ]
    sentences = [_choice_sentence(found)]
    sentences += _undecided_sentences(comparison, found)
    sentences += _worse_sentences(comparison, best, worse)
    sentences += _exact_match_sentences(comparison, chosen)
    if comparison.base.loss is not None:
        sentences.append(f"The base without any adapter: {significant(comparison.base.loss)}.")
    return Verdict(
        best.label, tied, worse, chosen.label, tuple(sentences),
        tuple(_cautions(comparison, untested)),
    )  # fmt: skip


def _labels(variants: Sequence[VariantResult]) -> tuple[str, ...]:
    return tuple(variant.label for variant in variants)


def _loss_words(variant: VariantResult) -> str:
    estimate = variant.estimates["loss"]
    words = f"{significant(estimate.mean)} nats per token"
    if estimate.low is not None and estimate.high is not None:
        bounds = f"{significant(estimate.low)} to {significant(estimate.high)}"
        words += f" (95 % interval {bounds})"
    return words


def _choice_sentence(found: Choice) -> str:
    best, chosen = found.best, found.chosen
    if chosen is best:
        text = f"Choose {best.label}: it has the lowest loss, {_loss_words(best)}"
        if found.as_good:
            others = f"{_listed(_labels(found.as_good))} {_verb(found.as_good)}"
            text += f"; {others} {_AS_GOOD}, but no cheaper"
        return f"{text}."
    small = (
        f"{byte_size(chosen.costs.stored_bytes)} stored, {byte_size(chosen.costs.optimizer_bytes)}"
    )
    return (
        f"Choose {chosen.label}: {best.label} has the lowest loss, {_loss_words(best)}; "
        f"{_listed(_labels(found.as_good))} {_verb(found.as_good)} {_AS_GOOD}, and "
        f"{chosen.label} is the cheapest ({small} of optimizer state)."
    )


def _undecided_sentences(comparison: Comparison, found: Choice) -> list[str]:
    """How much worse each may be although no difference was found."""
    tests = {v.label: difference(comparison, found.best.label, v.label, "loss")
             for v in found.undecided}  # fmt: skip
    most = [
        f"{label} may have up to {significant(most_lost(test, label), 2)} nats per token more loss"
        for label, test in tests.items()
        if test is not None
    ]
    if not most:
        return []
    names = [label for label, test in tests.items() if test is not None]
    return [
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} not significantly different from "
        f"{found.best.label}, which does not prove that there is no difference: by the 95 % "
        f"interval, {_listed(most)}. Rows and seeds decide; as good would be "
        f"{significant(found.margin, 2)}."
    ]


def _verb(variants: Sequence[VariantResult]) -> str:
    return "is" if len(variants) == 1 else "are"


def _worse_sentences(
    comparison: Comparison, best: VariantResult, worse: Sequence[str]
) -> list[str]:
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
