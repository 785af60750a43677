"""Which of the recorded models a server's answers are: numbers first, else texts.

Log-probabilities of first tokens lie some distance from those of the adapter at each recorded
strength.  The server is the adapted model if it lies nearer to it than half-way to the next
recorded strength; it is accused of another one only if it lies that near to that one.  What lies
between is not decided: rounding (a quantized server) moves numbers too, and never that selectively.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from loratune.runs.golden import ADAPTED, BASE, Golden, GoldenPrompt
from loratune.verify.served.answers import ServedAnswer

_FURTHEST = 5.0
"""Nats: beyond this a difference says no more."""
_NEAR = 0.5
"""Share of the distance between two recorded models within which a server is one of them."""
_TELLING = 0.3
"""Nats: models nearer than this to each other are not told apart by rounded numbers.

Measured: a Q4_1 base of 135 million parameters lies 0.07 to 0.08 nats from the model in fp32.
"""
_ALIKE = 0.5
"""Share of an answer, from its beginning, that two texts of one model have in common."""


class Served(StrEnum):
    """What a server serves."""

    adapted = "the adapted model"
    base = "the base model, without the adapter"
    scale = "the adapter at the wrong scale"
    other = "another adapter or another model"
    unclear = "nothing that the answers decide"


@dataclass(frozen=True)
class Judgement:
    """What the answers say.

    Attributes:
        served: which model.
        detail: by which numbers or texts.
    """

    served: Served
    detail: str


def judge(golden: Golden, answers: Sequence[ServedAnswer]) -> Judgement:
    """Which model gave ``answers`` to the golden prompts."""
    if any(answer.first for answer in answers):
        return _by_numbers(golden, answers)
    return _by_texts(golden, answers)


# -- by log-probabilities --------------------------------------------------------------------


def _by_numbers(golden: Golden, answers: Sequence[ServedAnswer]) -> Judgement:
    """The nearest recorded model."""
    adapted = golden.strengths.index(ADAPTED)
    measured = [_distances(p, a) for p, a in zip(golden.prompts, answers, strict=True) if a.first]
    away = [_mean(column) for column in zip(*measured, strict=True)]
    gaps = [_gap(golden, adapted, place) for place in range(len(away))]
    nearest = min(range(len(away)), key=away.__getitem__)
    base = golden.strengths.index(BASE)
    named = dict.fromkeys((adapted, base, nearest))
    shown = ", ".join(f"{away[n]:.2f} from {_name(golden.strengths[n])}" for n in named)
    detail = f"first tokens, in nats: {shown}"
    others = [gap for place, gap in enumerate(gaps) if place != adapted]
    if away[adapted] <= _NEAR * min(others):
        return Judgement(Served.adapted, detail)
    if nearest != adapted and gaps[nearest] >= _TELLING and away[nearest] <= _NEAR * away[adapted]:
        if nearest != base:
            return Judgement(Served.scale, detail)
        return Judgement(Served.base if away[base] <= _TELLING else Served.other, detail)
    texts = _by_texts(golden, answers)
    far = away[adapted] >= max(gaps[base], _TELLING)
    if far and texts.served is not Served.adapted:
        return Judgement(Served.other, f"{detail}; {texts.detail}")
    if texts.served in (Served.adapted, Served.base):
        return Judgement(texts.served, f"{detail}; {texts.detail}")
    return Judgement(Served.unclear, f"{detail}; {texts.detail}")


def _name(strength: float) -> str:
    if strength == BASE:
        return "the base"
    return "the adapter" if strength == ADAPTED else f"{strength:g} times the adapter"


def _distances(prompt: GoldenPrompt, answer: ServedAnswer) -> list[float]:
    """Mean difference of log-probabilities from each recorded strength."""
    stripped = _stripped(prompt.first)
    found = {
        text: prompt.first.get(text) or stripped.get(_without_spaces(text))
        for text in answer.first
        if text  # special tokens are written as nothing
    }
    common = [(values, answer.first[text]) for text, values in found.items() if values]
    if not common:
        return [_FURTHEST] * len(next(iter(prompt.first.values())))
    columns = zip(*(values for values, _ in common), strict=True)
    own = [value for _, value in common]
    return [_mean(list(map(_difference, column, own))) for column in columns]


def _gap(golden: Golden, one: int, other: int) -> float:
    """Distance between two recorded models, over the tokens that a server would tell."""
    pairs = [_pairs(prompt, one, other) for prompt in golden.prompts]
    return _mean([_mean([_difference(*pair) for pair in part]) for part in pairs])


def _pairs(prompt: GoldenPrompt, one: int, other: int) -> list[tuple[float, float]]:
    likely = sorted(prompt.first.values(), key=lambda values: -values[other])[:5]
    return [(values[one], values[other]) for values in likely]


def _difference(one: float, other: float) -> float:
    return min(abs(one - other), _FURTHEST)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _stripped(first: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """By text without spaces, which servers write differently: the likelier of two alike."""
    ordered = sorted(first.items(), key=lambda item: max(item[1]))
    return {_without_spaces(text): values for text, values in ordered if _PARTIAL not in text}


def _without_spaces(text: str) -> str:
    return text.translate(_SPACES).strip()


_PARTIAL = "\ufffd"
"""What part of a character is decoded to."""
_SPACES = str.maketrans({"\u2581": " ", "\u0120": " "})
"""What tokens are spelt with in place of a space."""


# -- by texts ----------------------------------------------------------------------------------


def _by_texts(golden: Golden, answers: Sequence[ServedAnswer]) -> Judgement:
    """The model whose recorded answers these are: a wrong scale is not told from another one."""
    told = [
        (prompt, answer.text)
        for prompt, answer in zip(golden.prompts, answers, strict=True)
        if prompt.base is None or prompt.base.strip() != prompt.adapted.strip()
    ]
    if not told:
        return Judgement(Served.unclear, "base and adapted model answered alike")
    like_adapted = _mean([_alike(text, prompt.adapted) for prompt, text in told])
    like_base = _mean([_alike(text, prompt.base or "") for prompt, text in told])
    same = sum(text.strip() == prompt.adapted.strip() for prompt, text in told)
    detail = (
        f"{same} of {len(told)} answers are the adapted model's; alike from the beginning: "
        f"{like_adapted:.0%} with the adapted model's, {like_base:.0%} with the base's"
    )
    if like_adapted >= _ALIKE and like_adapted > like_base:
        return Judgement(Served.adapted, detail)
    if like_base >= _ALIKE and not same:
        return Judgement(Served.base, detail)
    if not same and like_adapted < _ALIKE / 2 and len(told) > 2:
        return Judgement(Served.other, detail)
    return Judgement(Served.unclear, detail)


def _alike(text: str, recorded: str) -> float:
    """Share of the longer text that both begin with."""
    one, other = text.strip(), recorded.strip()
    longest = max(len(one), len(other))
    if not longest:
        return 1.0
    pairs = enumerate(zip(one, other, strict=False))
    common = next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
    return common / longest
