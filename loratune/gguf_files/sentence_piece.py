"""SentencePiece's BPE, which merges by scores, from ``tokenizer.json``, which merges by a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratune.data.tokenizing import SPACE_MARKS
from loratune.errors import ModelError

_SPACE = SPACE_MARKS[0]
_UNREACHED = -1e9
"""Score of a piece that no merge makes."""


def merge_scores(specification: Mapping[str, Any], where: str) -> dict[str, float]:
    """Piece to score, such that merging the best-scored pair first is merging by the list.

    llama.cpp merges any neighbours that spell a piece; the list may name fewer.  Both are the
    same where the list has every split of every piece, and all splits of one piece in a row.

    Args:
        specification: ``tokenizer.json``.
        where: named in errors.

    Raises:
        ModelError: if no scores say the same as the list.
    """
    model = specification["model"]
    vocabulary = model["vocab"]
    ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
    ranges: dict[str, tuple[int, int]] = {}
    for (left, right), rank in ranks.items():
        first, last = ranges.get(left + right, (rank, rank))
        ranges[left + right] = min(first, rank), max(last, rank)
    _require_in_a_row(ranges, where)
    _require_every_split(vocabulary, ranges.keys(), ranks, where)
    order = sorted(ranges, key=lambda piece: ranges[piece])
    scores = dict.fromkeys(vocabulary, _UNREACHED)
    return scores | {piece: -float(place) for place, piece in enumerate(order)}


def _pair(merge: Any) -> tuple[str, str]:
    """A merge; older files write it as one text with a space."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _require_in_a_row(ranges: Mapping[str, tuple[int, int]], where: str) -> None:
    before = -1
    for first, last in sorted(ranges.values()):
        if first <= before:
            raise _not_scored("merges into one piece are interrupted by others", where)
        before = last


def _require_every_split(
    vocabulary: Mapping[str, int],
    merged: Sequence[str] | Any,
    ranks: Mapping[tuple[str, str], int],
    where: str,
) -> None:
    for piece in merged:
        for place in range(1, len(piece)):
            pair = piece[:place], piece[place:]
            if pair not in ranks and pair[0] in vocabulary and pair[1] in vocabulary:
                raise _not_scored(f"'{piece}' is not merged from '{pair[0]}' + '{pair[1]}'", where)


def adds_space(specification: Mapping[str, Any], where: str) -> bool:
    """Whether a space is put before a text, from the normalizer and pre-tokenizer.

    Raises:
        ModelError: if they do more than writing spaces as marks.
    """
    normalizer = specification.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    splitter = specification.get("pre_tokenizer") or {}
    added = False
    for step in steps:
        if step["type"] == "Prepend" and step.get("prepend") == _SPACE:
            added = True
        elif step["type"] != "Replace" or not _writes_space(step):
            raise _not_scored(f"its normalizer has a step '{step['type']}'", where)
    if splitter.get("type") == "Metaspace" and not splitter.get("split"):
        return added or splitter.get("prepend_scheme") in ("first", "always")
    writes = any(step["type"] == "Replace" for step in steps)
    nothing = not splitter or _splits_nothing(splitter)
    if not nothing or not writes:
        raise _not_scored(f"it is split by '{splitter.get('type')}'", where)
    return added


def _writes_space(step: Mapping[str, Any]) -> bool:
    return step.get("pattern") == {"String": " "} and step.get("content") == _SPACE


def _splits_nothing(splitter: Mapping[str, Any]) -> bool:
    """Gemma splits at spaces, of which the normalizer leaves none."""
    return splitter["type"] == "Split" and splitter.get("pattern") == {"String": " "}


def _not_scored(what: str, where: str) -> ModelError:
    return ModelError(
        f"llama.cpp cannot tokenize as this tokenizer does: {what}",
        where=where,
        fix="export format=merged",
    )
