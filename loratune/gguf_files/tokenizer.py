"""The tokenizer inside a GGUF file: vocabulary, special tokens, ends, chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType

from loratune.data.tokenizing import RowTokenizer, Tokenizer
from loratune.errors import ModelError
from loratune.gguf_files.byte_level import pre_tokenizer_name
from loratune.gguf_files.sentence_piece import adds_space, merge_scores

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_END_KEYS = ("add_eos_token_id", "add_eot_token_id", "add_eom_token_id")
"""GGUF has places for three ends: of the text, of a turn, of a message."""


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer as a GGUF file holds it.

    Attributes:
        model: gpt2 (bytes) or llama (SentencePiece).
        tokens: every id's token, as many as the model has embeddings.
        types: their kinds.
        start: the id before every text; ``None`` where there is none.
        pre: llama.cpp's pre-tokenizer; bytes only.
        merges: bytes only.
        scores: SentencePiece only.
        space: whether a space is put before a text; SentencePiece only.
        notes: what llama.cpp does otherwise.
    """

    model: str
    tokens: list[str]
    types: list[TokenType]
    start: int | None
    pre: str = ""
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space: bool = False
    notes: tuple[str, ...] = ()


def read_tokenizer(tokenizer: Tokenizer, rows: int, where: str) -> GgufTokenizer:
    """A tokenizer of transformers as llama.cpp can follow it token by token.

    Args:
        tokenizer: the model's.
        rows: of the model's embeddings.
        where: named in errors.

    Raises:
        ModelError: naming what in it llama.cpp would do otherwise.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("it is not a tokenizer of the library tokenizers", where)
    specification = json.loads(backend.to_str())
    model = specification["model"]
    if model["type"] != "BPE" or model.get("dropout"):
        raise _refused(f"its model is '{model['type']}'", where)
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refused("its pieces have prefixes or suffixes", where)
    _check_added(specification["added_tokens"], where)
    tokens, types = _vocabulary(specification, rows, where)
    start = _start(tokenizer, where)
    if model.get("byte_fallback"):
        scores = merge_scores(specification, where)
        space = adds_space(specification, where)
        own = [scores.get(token, 0.0) for token in tokens]
        return GgufTokenizer("llama", tokens, types, start, scores=own, space=space)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    pre, notes = pre_tokenizer_name(specification, where), _normalizer_notes(specification, where)
    return GgufTokenizer("gpt2", tokens, types, start, pre, merges, notes=notes)


def _check_added(added: Sequence[Mapping[str, Any]], where: str) -> None:
    for token in added:
        for key in ("lstrip", "rstrip", "single_word"):
            if token.get(key):
                raise _refused(f"its token '{token['content']}' has {key}", where)


def _vocabulary(
    specification: Mapping[str, Any], rows: int, where: str
) -> tuple[list[str], list[TokenType]]:
    """Token and kind of every id; ids without a token fill up to the embeddings' rows."""
    by_id = {number: token for token, number in specification["model"]["vocab"].items()}
    added = {token["id"]: token for token in specification["added_tokens"]}
    by_id |= {number: token["content"] for number, token in added.items()}
    if max(by_id) >= rows:
        raise _refused(f"it has ids up to {max(by_id):,}, the embeddings {rows:,} rows", where)
    unknown = specification["model"].get("unk_token")
    kinds = list(_kinds(by_id, added, rows, unknown))
    return [by_id.get(number, f"[PAD{number}]") for number in range(rows)], kinds


def _kinds(
    by_id: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], rows: int, unknown: str | None
) -> Iterator[TokenType]:
    for number in range(rows):
        if number not in by_id:
            yield TokenType.UNUSED
        elif by_id[number] == unknown:
            yield TokenType.UNKNOWN
        elif number in added:
            special = added[number].get("special")
            yield TokenType.CONTROL if special else TokenType.USER_DEFINED
        else:
            yield TokenType.BYTE if _BYTE.fullmatch(by_id[number]) else TokenType.NORMAL


def _start(tokenizer: Tokenizer, where: str) -> int | None:
    """The one id that rows begin with, which must be the tokenizer's start token."""
    ids = RowTokenizer(tokenizer).start_ids
    if not ids:
        return None
    if ids != [tokenizer.bos_token_id]:
        raise _refused(f"texts begin with the tokens {ids}, not with its start token", where)
    return ids[0]


def _normalizer_notes(specification: Mapping[str, Any], where: str) -> tuple[str, ...]:
    normalizer = specification.get("normalizer")
    if normalizer is None:
        return ()
    if normalizer["type"] == "NFC":
        return ("llama.cpp does not bring text into Unicode's form NFC, as the tokenizer does",)
    raise _refused(f"its normalizer is '{normalizer['type']}'", where)


def _refused(what: str, where: str) -> ModelError:
    return ModelError(
        f"llama.cpp cannot tokenize as this tokenizer does: {what}",
        where=where,
        fix="export format=merged",
    )


def add_tokenizer(
    writer: GGUFWriter,
    tokenizer: GgufTokenizer,
    special: Tokenizer,
    stops: Sequence[int],
    template: str | None,
) -> list[int]:
    """Write a tokenizer into a file.

    Args:
        writer: of the file.
        tokenizer: what ``read_tokenizer`` made.
        special: the tokenizer of transformers, for the ids of its special tokens.
        stops: every id that ends an answer, the one that training taught first.
        template: the chat template of training, if there was one.

    Returns:
        The stops for which the file has no place.
    """
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.model == "llama":
        writer.add_token_scores(tokenizer.scores)
        writer.add_add_space_prefix(tokenizer.space)
    else:
        writer.add_tokenizer_pre(tokenizer.pre)
        writer.add_token_merges(tokenizer.merges)
    if special.bos_token_id is not None:
        writer.add_bos_token_id(special.bos_token_id)
    writer.add_add_bos_token(tokenizer.start is not None)
    writer.add_add_eos_token(False)
    if special.pad_token_id is not None:
        writer.add_pad_token_id(special.pad_token_id)
    for key, stop in zip(_END_KEYS, stops, strict=False):
        getattr(writer, key)(stop)
    if template is not None:
        writer.add_chat_template(template)
    return list(stops[len(_END_KEYS) :])
