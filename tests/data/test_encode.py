from __future__ import annotations

from typing import Any

import pytest

from loratune.config.schema import DataConfig, Overlong, RowFormat
from loratune.data.encode import Encoder
from loratune.data.encoded_rows import EncodedRow, EncodedRows, length_to_keep
from loratune.data.rows import Example
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import RowTokenizer
from loratune.errors import DataError, ModelError
from loratune.loss.constants import IGNORED

from .conftest import space_prefixing_tokenizer

PROMPT = PromptFormat(RowFormat.prompt, "{prompt}", answer="completion")
TEXT = PromptFormat(RowFormat.text, answer="text")
PAIRS = [
    ("Question: what is red?", " the red fox"),
    ("name : Alimentum\nAnswer:", " blue"),
    ("no space", "follows"),
    ("ends with a space ", "then"),
    ("tab\t", "\nnew line  \n"),
    ("café ☃", " naïve 🦊"),
]


def encode(
    tokenizer: Any, pairs: list[tuple[str, str]], max_length: int = 512, **options: Any
) -> EncodedRows:
    examples = [Example(f"f:{n}", p, a) for n, (p, a) in enumerate(pairs, start=1)]
    chosen = PROMPT if pairs[0][0] else TEXT
    overlong = options.get("overlong", Overlong.truncate)
    return Encoder(RowTokenizer(tokenizer), chosen, DataConfig()).encode(
        examples, max_length=max_length, overlong=overlong
    )


def supervised_ids(row: EncodedRow) -> list[int]:
    return [label for label in row.labels if label != IGNORED]


@pytest.fixture(params=["opt_like", "gpt2_like"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_what_is_supervised_decodes_to_the_answer_and_the_end_token(tokenizer: Any) -> None:
    for (_, answer), row in zip(PAIRS, encode(tokenizer, PAIRS).rows, strict=True):
        assert tokenizer.decode(supervised_ids(row)) == answer + "</s>"
        labels = row.labels
        assert all(
            label in (IGNORED, token) for label, token in zip(labels, row.input_ids, strict=True)
        )
        assert labels[row.prompt_length - 1] == IGNORED != labels[row.prompt_length]


def test_labels_shifted_by_one_would_not_pass_the_decoding_oracle(tokenizer: Any) -> None:
    row = encode(tokenizer, PAIRS).rows[0]
    for shift in (-1, 1):
        spans = tuple((a + shift, b + shift) for a, b in row.spans)
        moved = EncodedRow([*row.input_ids, 0], spans, row.prompt_length, row.source)
        assert tokenizer.decode(supervised_ids(moved)) != PAIRS[0][1] + "</s>"


def test_the_ids_of_a_prompt_alone_are_the_prefix_of_its_row(tokenizer: Any) -> None:
    encoder = Encoder(RowTokenizer(tokenizer), PROMPT, DataConfig())
    for (prompt, _), row in zip(PAIRS, encode(tokenizer, PAIRS).rows, strict=True):
        alone = encoder.prompt_ids(Example("f:1", prompt))
        assert row.input_ids[: row.prompt_length] == alone
        assert alone == tokenizer(prompt)["input_ids"]


def test_a_start_token_is_there_once_also_where_the_text_writes_it(opt_like: Any) -> None:
    start = opt_like.bos_token_id
    for prompt in ("hello", "<s>hello"):
        row = encode(opt_like, [(prompt, " world")]).rows[0]
        assert row.input_ids.count(start) == 1 and row.input_ids[0] == start


def test_an_end_token_is_there_once_also_where_the_answer_writes_it(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    for answer in (" world", " world</s>"):
        row = encode(tokenizer, [("hello", answer)]).rows[0]
        assert row.input_ids.count(end) == 1 and supervised_ids(row)[-1] == end


def test_an_end_token_inside_the_prompt_is_not_supervised(tokenizer: Any) -> None:
    row = encode(tokenizer, [("one</s>two", " three")]).rows[0]
    places = [n for n, token in enumerate(row.input_ids) if token == tokenizer.eos_token_id]
    assert [row.labels[place] == IGNORED for place in places] == [True, False]


def test_every_token_of_a_text_is_supervised_but_the_first(tokenizer: Any) -> None:
    row = encode(tokenizer, [("", "the cat sat")]).rows[0]
    assert row.labels[0] == IGNORED
    assert supervised_ids(row) == row.input_ids[1:]
    assert tokenizer.decode(row.input_ids).removeprefix("<s>") == "the cat sat</s>"


def test_a_tokenizer_that_prefixes_spaces_puts_none_before_the_answer() -> None:
    tokenizer = space_prefixing_tokenizer()
    pairs = [("the cat", " sat"), ("the c", "at")]
    for (prompt, answer), row in zip(pairs, encode(tokenizer, pairs).rows, strict=True):
        assert tokenizer.decode(row.input_ids) == prompt + answer + "</s>"


def test_padding_is_the_end_token_where_there_is_no_pad_token(
    opt_like: Any, gpt2_like: Any
) -> None:
    assert RowTokenizer(gpt2_like).pad_id == gpt2_like.eos_token_id
    assert RowTokenizer(opt_like).pad_id == opt_like.pad_token_id


def test_a_tokenizer_without_an_end_token_is_refused(gpt2_like: Any) -> None:
    import copy

    bare = copy.deepcopy(gpt2_like)
    bare.eos_token = None
    with pytest.raises(ModelError, match="no end token"):
        RowTokenizer(bare)


def test_truncation_cuts_the_end_and_counts_the_supervised_tokens_lost(tokenizer: Any) -> None:
    whole = encode(tokenizer, PAIRS[:1]).rows[0]
    result = encode(tokenizer, PAIRS[:1], max_length=len(whole) - 3)
    assert result.rows[0].input_ids == whole.input_ids[:-3]
    assert supervised_ids(result.rows[0]) == supervised_ids(whole)[:-3]
    assert (result.truncated, result.lost_target_tokens) == (1, 3)
    exact = encode(tokenizer, PAIRS[:1], max_length=len(whole))
    assert exact.rows == [whole] and exact.truncated == 0


def test_rows_whose_prompt_fills_the_length_are_dropped_and_the_rest_untouched(
    tokenizer: Any,
) -> None:
    long = [("word " * 200, " x")] * 10
    mixed = encode(tokenizer, [*PAIRS[:3], *long, *PAIRS[3:]], max_length=64)
    alone = encode(tokenizer, PAIRS, max_length=64)
    assert mixed.dropped == {"no_target": 10}
    assert [row.input_ids for row in mixed.rows] == [row.input_ids for row in alone.rows]
    assert mixed.kept == [0, 1, 2, 13, 14, 15]


def test_no_supervised_token_anywhere_is_an_error_that_names_the_lengths(tokenizer: Any) -> None:
    pairs = [("the cat sat on the mat . red fox " * (n + 1), " x") for n in range(48)]
    whole = encode(tokenizer, pairs, max_length=10_000)
    with pytest.raises(DataError) as caught:
        encode(tokenizer, pairs, max_length=6)
    text = str(caught.value)
    assert "48/48 rows have no supervised token" in text and "data.max_length=6" in text
    for share in (0.95, 0.99, 1.0):
        length = length_to_keep(whole.lengths, share)
        assert f"{length} keeps {share:.0%}" in text
        kept = sum(n <= length for n in whole.lengths)
        assert kept / 48 >= share > sum(n < length for n in whole.lengths) / 48


def test_overlong_rows_can_be_dropped_or_refused_by_line(tokenizer: Any) -> None:
    pairs = [*PAIRS, ("hello", " world" * 300)]
    dropped = encode(tokenizer, pairs, max_length=64, overlong=Overlong.drop)
    assert dropped.dropped == {"overlong": 1} and len(dropped.rows) == len(PAIRS)
    with pytest.raises(DataError, match=r"max_length is 64.*f:7"):
        encode(tokenizer, pairs, max_length=64, overlong=Overlong.error)


def test_a_token_beyond_the_embedding_is_a_model_error_with_both_numbers(tokenizer: Any) -> None:
    rows = [row.input_ids for row in encode(tokenizer, PAIRS).rows]
    largest = max(map(max, rows))
    RowTokenizer(tokenizer).check_ids(rows, largest + 1)
    with pytest.raises(ModelError, match=f"token {largest}, the model has {largest}"):
        RowTokenizer(tokenizer).check_ids(rows, largest)


def test_a_text_of_megabytes_gives_the_same_tokens_as_its_beginning(tokenizer: Any) -> None:
    words = " the red fox sat on the mat"
    huge = encode(tokenizer, [("hello", words * 200_000)], max_length=64)
    small = encode(tokenizer, [("hello", words * 100)], max_length=64)
    assert huge.rows[0].input_ids == small.rows[0].input_ids
    assert huge.truncated == 1
