"""Tokenizers as llama.cpp follows them, or the reason why it cannot."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gguf_files.bases import ROWS
from loratune.errors import ModelError
from loratune.gguf_files.byte_level import pre_tokenizer_name
from loratune.gguf_files.questions import TEXTS
from loratune.gguf_files.sentence_piece import adds_space, merge_scores
from loratune.gguf_files.tokenizer import read_tokenizer
from loratune.models.source import model_folder

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN_BYTES = BYTES | {"use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(expression: str) -> dict[str, Any]:
    pattern = {"Regex": expression}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def specification(*steps: dict[str, Any], ignore_merges: bool = False) -> dict[str, Any]:
    splitter = {"type": "Sequence", "pretokenizers": list(steps)} if len(steps) > 1 else steps[0]
    return {"pre_tokenizer": splitter, "model": {"ignore_merges": ignore_merges}}


KNOWN = {
    "gpt-2": specification(BYTES),
    "smollm": specification(DIGITS, BYTES),
    "llama-bpe": specification(split(LLAMA_3), PLAIN_BYTES, ignore_merges=True),
    "smaug-bpe": specification(split(LLAMA_3), PLAIN_BYTES),
    "qwen2": specification(split(LLAMA_3.replace("{1,3}", "")), PLAIN_BYTES),
}
UNKNOWN = {
    "digits in threes, otherwise": specification(split(LLAMA_3.replace("3}", "2}")), PLAIN_BYTES),
    "a space before every text": specification(BYTES | {"add_prefix_space": True}),
    "a step that llama.cpp lacks": specification({"type": "Punctuation"}, BYTES),
    "no bytes": specification({"type": "Whitespace"}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_pre_tokenizer_is_told_by_what_it_does(name: str) -> None:
    assert pre_tokenizer_name(KNOWN[name], "here") == name


@pytest.mark.parametrize("name", UNKNOWN)
def test_one_that_is_not_certain_to_split_alike_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="no pre-tokenizer of llama"):
        pre_tokenizer_name(UNKNOWN[name], "here")


def test_every_row_of_the_embeddings_has_a_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder("builtin:demo-opt"))
    found = read_tokenizer(tokenizer, ROWS, "here")
    assert (found.model, found.pre, found.start) == ("gpt2", "gpt-2", 2)
    vocabulary = tokenizer.get_vocab()
    assert found.tokens[: len(vocabulary)] == sorted(vocabulary, key=vocabulary.__getitem__)
    assert found.tokens[-1] == f"[PAD{ROWS - 1}]"
    assert len(set(found.tokens)) == len(found.types) == ROWS
    kinds = dict(zip(found.tokens, found.types, strict=True))
    assert (kinds["</s>"], kinds["a"]) == (TokenType.CONTROL, TokenType.NORMAL)
    assert kinds[f"[PAD{ROWS - 1}]"] is TokenType.UNUSED


def test_a_token_beyond_the_embeddings_is_named() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder("builtin:demo-opt"))
    with pytest.raises(ModelError, match="ids up to 739, the embeddings 700 rows"):
        read_tokenizer(tokenizer, 700, "here")


# -- SentencePiece -------------------------------------------------------------------------


def sentence_piece(*, prepend: bool) -> PreTrainedTokenizerFast:
    """Trained on the texts, its list of merges as transformers makes it of scores: every split."""
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    model = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = [normalizers.Replace(" ", "▁")]
    if prepend:
        steps.insert(0, normalizers.Prepend("▁"))
    model.normalizer = normalizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], limit_alphabet=60
    )
    model.train_from_iterator(TEXTS * 3, trainer)
    values = json.loads(model.to_str())
    vocabulary = values["model"]["vocab"]
    pieces = [left + right for left, right in values["model"]["merges"]]
    values["model"]["merges"] = [
        [piece[:place], piece[place:]]
        for piece in dict.fromkeys(pieces)
        for place in range(1, len(piece))
        if piece[:place] in vocabulary and piece[place:] in vocabulary
    ]
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] not in bytes_]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(values)), bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


def merged_by_scores(text: str, scores: dict[str, float], vocabulary: dict[str, int]) -> list[int]:
    """SentencePiece's rule: of all neighbours that spell a piece, the best score, the leftmost."""
    pieces = list(text)
    while True:
        pairs = [(scores.get(a + b), -n) for n, (a, b) in enumerate(pairwise(pieces))]
        best = max((pair for pair in pairs if pair[0] is not None), default=None)
        if best is None:
            break
        place = -best[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    ids = []
    for piece in pieces:
        bytes_ = [vocabulary[f"<0x{byte:02X}>"] for byte in piece.encode()]
        ids += [vocabulary[piece]] if piece in vocabulary else bytes_
    return ids


@pytest.mark.parametrize("prepend", [False, True])
def test_scores_merge_as_the_list_does(prepend: bool) -> None:
    tokenizer = sentence_piece(prepend=prepend)
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    scores = merge_scores(values, "here")
    assert adds_space(values, "here") is prepend
    vocabulary = tokenizer.get_vocab()
    for text in TEXTS:
        written = ("▁" if prepend else "") + text.replace(" ", "▁")
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert merged_by_scores(written, scores, vocabulary) == expected


def test_the_file_s_kinds_of_sentence_piece() -> None:
    found = read_tokenizer(sentence_piece(prepend=False), 800, "here")
    kinds = dict(zip(found.tokens, found.types, strict=True))
    assert (found.model, found.space, found.start) == ("llama", False, None)
    assert (kinds["<unk>"], kinds["<0x0A>"]) == (TokenType.UNKNOWN, TokenType.BYTE)
    assert kinds["</s>"] is TokenType.CONTROL


def test_a_list_that_no_scores_say_is_refused() -> None:
    values = json.loads(sentence_piece(prepend=False).backend_tokenizer.to_str())
    merges = values["model"]["merges"]
    several = next(n for n, (a, b) in enumerate(merges) if a + b == "".join(merges[n + 1]))
    left_out = {**values["model"], "merges": merges[:several] + merges[several + 1 :]}
    with pytest.raises(ModelError, match="is not merged from"):
        merge_scores({**values, "model": left_out}, "here")
    parted = [*merges[:several], *merges[several + 1 :], merges[several]]
    with pytest.raises(ModelError, match="interrupted"):
        merge_scores({**values, "model": {**values["model"], "merges": parted}}, "here")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("normalizer", {"type": "NFKC"}, "NFKC"),
        ("pre_tokenizer", {"type": "Whitespace"}, "Whitespace"),
    ],
)
def test_what_sentence_piece_does_beside_merging_is_refused(
    key: str, value: dict[str, Any], said: str
) -> None:
    values = json.loads(sentence_piece(prepend=False).backend_tokenizer.to_str())
    with pytest.raises(ModelError, match=said):
        adds_space({**values, key: value}, "here")
