"""Tokenizers as this package uses them: text to ids, with the special tokens placed by us.

Every row begins with the tokens that the tokenizer puts before a text (OPT's and Llama's start
token), once, and ends with its end token.  Nothing else the tokenizer would add is used, so that
the ids of a prompt alone are the prefix of the ids of prompt and answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from loratune.errors import ModelError

_ANCHOR = "\n"
_PROBE = "a"
SPACE_MARKS = ("\u2581", "\u0120")
"""How SentencePiece and byte-level BPE write a space."""


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    all_special_tokens: list[str]
    chat_template: Any

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]:
        """Ids of several texts under ``input_ids``."""

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """Text of ids."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Tokens as the vocabulary writes them."""

    def get_vocab(self) -> dict[str, int]:
        """Token to id."""

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any:
        """A conversation as text."""


def special_tokens(tokenizer: Tokenizer) -> list[str]:
    """Texts that the tokenizer reads as tokens with a meaning of their own, longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = {*tokenizer.all_special_tokens, *(str(t) for t in added if t.special)}
    return sorted(filter(None, texts), key=len, reverse=True)


def added_tokens(tokenizer: Tokenizer) -> set[str]:
    """Texts that are one token wherever they stand, special or not (Qwen 3's ``</think>``)."""
    return {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}


class RowTokenizer:
    """Text to ids.

    Attributes:
        start_ids: what comes before every row; empty for GPT-2.
        end_id: the end token, supervised after every answer.
        pad_id: fills up batches; never attended to, never supervised.

    Raises:
        ModelError: if the tokenizer has no end token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_token_id is None:
            fix = 'add "eos_token" to its tokenizer_config.json'
            raise ModelError("the tokenizer has no end token", where="tokenizer", fix=fix)
        self.tokenizer = tokenizer
        self.end_id = int(tokenizer.eos_token_id)
        self.pad_id = self.end_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.start_ids = self._find_start_ids()
        self._anchor_ids = self._find_anchor_ids()
        self._longest_token: int | None = None

    def opening_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that begin a row: the start token once, also where the text has it."""
        start = self.start_ids
        return [ids if start and ids[: len(start)] == start else start + ids
                for ids in self._unique(texts, self._ids)]  # fmt: skip

    def following_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that continue a row: nothing is put before them, no space either."""
        return self._unique(texts, self._anchored_ids)

    def spelt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that spell special tokens and are none: encoded as any other text."""
        return self._unique(texts, self._spelt_ids)

    def special_ids(self) -> set[int]:
        """Ids of the tokens with a meaning of their own."""
        vocabulary = self.tokenizer.get_vocab()
        return {vocabulary[t] for t in special_tokens(self.tokenizer) if t in vocabulary}

    def longest_token(self) -> int:
        """Characters of the longest token: a text of n times as many has more than n tokens."""
        if self._longest_token is None:
            self._longest_token = max(map(len, self.tokenizer.get_vocab()), default=1)
        return self._longest_token

    def check_ids(self, rows: Iterable[Sequence[int]], vocab_size: int) -> None:
        """Compare the largest id with the model's embedding.

        Raises:
            ModelError: naming both.
        """
        largest = max((max(ids) for ids in rows if ids), default=0)
        if largest >= vocab_size:
            cause = f"the tokenizer gives token {largest}, the model has {vocab_size} embeddings"
            fix = "use the tokenizer that belongs to the model"
            raise ModelError(f"{cause} (0 to {vocab_size - 1})", where="tokenizer", fix=fix)

    def _unique(self, texts: Sequence[str], encode: Any) -> list[list[int]]:
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return []
        known = dict(zip(distinct, encode(distinct), strict=True))
        return [known[text] for text in texts]

    def _ids(
        self, texts: list[str], *, special: bool = False, spelt: bool = False
    ) -> list[list[int]]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            split_special_tokens=spelt,
            verbose=False,
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def _anchored_ids(self, texts: list[str], *, spelt: bool = False) -> list[list[int]]:
        anchor = self._anchor_ids
        if not anchor:
            return self._ids(texts, spelt=spelt)
        anchored = self._ids([_ANCHOR + text for text in texts], spelt=spelt)
        cut = [ids[len(anchor) :] if ids[: len(anchor)] == anchor else None for ids in anchored]
        merged = [text for text, ids in zip(texts, cut, strict=True) if ids is None]
        plain = iter(self._ids(merged, spelt=spelt) if merged else [])
        return [next(plain) if ids is None else ids for ids in cut]

    def _spelt_ids(self, texts: list[str]) -> list[list[int]]:
        """An added token that is not special is found even so: only its parts are text."""
        vocabulary = self.tokenizer.get_vocab()
        encoded = self._anchored_ids(texts, spelt=True)
        for place, text in enumerate(texts):
            if vocabulary.get(text) in encoded[place]:
                head, tail = self._anchored_ids([text[:1], text[1:]], spelt=True)
                encoded[place] = head + tail
        return encoded

    def _find_start_ids(self) -> list[int]:
        plain, special = self._ids([_PROBE])[0], self._ids([_PROBE], special=True)[0]
        for start in range(len(special) - len(plain) + 1):
            if plain and special[start : start + len(plain)] == plain:
                return special[:start]
        return special[:1] if special[:1] == [self.tokenizer.bos_token_id] else []

    def _find_anchor_ids(self) -> list[int]:
        """Ids of a line break, where the tokenizer puts a space before every text it is given.

        SentencePiece's Llama does: an answer encoded alone would begin with a space of its own.
        """
        tokens = self.tokenizer.convert_ids_to_tokens(self._ids([_PROBE])[0][:1])
        if tokens and tokens[0] and tokens[0].startswith(SPACE_MARKS):
            return self._ids([_ANCHOR])[0]
        return []
