"""Byte-level BPE: which of llama.cpp's pre-tokenizers splits text as a tokenizer does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratune.errors import ModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UP_TO_THREE_DIGITS = _CONTRACTIONS + r"|\p{N}{1,3}" + _REST
_ONE_DIGIT = _CONTRACTIONS + r"|\p{N}" + _REST


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split before merging, read off ``tokenizer.json``.

    Attributes:
        splits: regular expressions and ``digits`` (each alone), in their order.
        own_regex: GPT-2's expression of the byte-level step itself.
        ignore_merges: a piece that is a token is taken whole, whatever the merges say.
    """

    splits: tuple[str, ...]
    own_regex: bool
    ignore_merges: bool = False


_LLAMA_CPP = {
    PreTokenizer((), own_regex=True): "gpt-2",
    PreTokenizer(("digits",), own_regex=True): "smollm",
    PreTokenizer((_UP_TO_THREE_DIGITS,), own_regex=False, ignore_merges=True): "llama-bpe",
    PreTokenizer((_UP_TO_THREE_DIGITS,), own_regex=False): "smaug-bpe",
    PreTokenizer((_ONE_DIGIT,), own_regex=False): "qwen2",
}
"""``tokenizer.ggml.pre`` of those whose expressions llama.cpp has letter by letter."""


def pre_tokenizer_name(specification: Mapping[str, Any], where: str) -> str:
    """``tokenizer.ggml.pre`` for a tokenizer of bytes.

    Args:
        specification: ``tokenizer.json``.
        where: named in errors.

    Raises:
        ModelError: if llama.cpp has none that is certain to split alike.
    """
    steps = specification.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps]) if steps else []
    read = PreTokenizer(
        tuple(_split(step, where) for step in steps[:-1]),
        own_regex=_byte_level(steps, where),
        ignore_merges=bool(specification["model"].get("ignore_merges")),
    )
    found = _LLAMA_CPP.get(read)
    if found is None:
        shown = ", ".join((*read.splits, "GPT-2's own" if read.own_regex else "bytes"))
        raise _unknown(f"splits text by {shown}", where)
    return found


def _split(step: Mapping[str, Any], where: str) -> str:
    if step["type"] == "Digits" and step.get("individual_digits"):
        return "digits"
    pattern = step.get("pattern") or {}
    plain = step.get("behavior") == "Isolated" and not step.get("invert")
    if step["type"] == "Split" and plain and "Regex" in pattern:
        return str(pattern["Regex"])
    raise _unknown(f"has a step '{step['type']}'", where)


def _byte_level(steps: list[Mapping[str, Any]], where: str) -> bool:
    """Whether the last step, which must be the byte-level one, splits by GPT-2's expression."""
    last = steps[-1] if steps else {"type": "none"}
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        spaced = " that puts a space before every text" if last.get("add_prefix_space") else ""
        raise _unknown(f"ends in a step '{last['type']}'{spaced}", where)
    return bool(last.get("use_regex", True))


def _unknown(what: str, where: str) -> ModelError:
    return ModelError(
        f"the tokenizer {what}: no pre-tokenizer of llama.cpp is certain to do the same",
        where=where,
        fix="export format=merged",
    )
