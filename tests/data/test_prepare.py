from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratune.config.schema import DataConfig, RowFormat
from loratune.data.prepare import PreparedData, prepare_data
from loratune.data.templates import PromptFormat
from loratune.errors import DataError, ModelError

ROWS = [{"prompt": f"the cat {n}", "completion": f" sat {n} times"} for n in range(40)]


def prepared(tokenizer: Any, seed: int = 0, **config: Any) -> PreparedData:
    paths = {key: str(value) if key.endswith("path") else value for key, value in config.items()}
    return prepare_data(DataConfig(**paths), tokenizer, len(tokenizer), seed)


def test_the_report_adds_up(opt_like: Any, write_rows: Callable[..., Path]) -> None:
    blank = [{"prompt": "a", "completion": None}] * 5
    long = [{"prompt": "word " * 200, "completion": "x"}] * 3
    data = prepared(opt_like, path=write_rows([*ROWS, *blank, *long]), max_length=64)
    report = data.report.train
    assert report is not None and data.report.eval is None
    assert report.dropped == {"empty": 5, "no_target": 3}
    assert report.rows == 48 == report.kept + sum(report.dropped.values())
    assert report.tokens == sum(len(row.input_ids) for row in data.train)
    assert report.supervised_tokens == sum(row.supervised for row in data.train)
    assert report.longest > 200
    assert "empty=5 no_target=3" in data.report.lines()[0]
    assert any("no_target=3" in text for text in data.report.warnings)
    json.dumps(data.report.to_dict(), allow_nan=False)


def test_the_report_says_what_became_of_the_columns(
    opt_like: Any, write_rows: Callable[..., Path]
) -> None:
    path = write_rows([{**row, "id": n, "text": "x"} for n, row in enumerate(ROWS)])
    held_out = write_rows([{"prompt": "red", "completion": 7, "topic": "x"}], "eval.jsonl")
    report = prepared(opt_like, path=path, eval_path=held_out).report
    assert report.notes == (
        "the rows hold several formats (prompt+completion, text): data.format=prompt is used",
        "columns not used: id (40 rows), text (40 rows), topic (1 row)",
        "numbers taken as text: completion (1 row)",
    )
    assert report.lines()[-1] == "note: numbers taken as text: completion (1 row)"
    assert report.to_dict()["notes"] == list(report.notes)
    assert len(prepared(opt_like, path=path, format=RowFormat.prompt).report.notes) == 1


def test_earlier_exchanges_are_seen_and_not_supervised(
    opt_like: Any, write_rows: Callable[..., Path]
) -> None:
    row = {"system": "s", "history": [["a", "Blue."]], "instruction": "b", "output": "Blue."}
    (encoded,) = prepared(opt_like, path=write_rows([row])).train
    ((start, end),) = encoded.spans
    assert opt_like.decode(encoded.input_ids[start:end]) == "Blue.</s>"
    seen = opt_like.decode(encoded.input_ids[:start])
    assert "### Answer\nBlue.\n" in seen and seen.endswith("b\n\n### Answer\n")


def test_rows_that_are_all_blank_are_an_error(
    opt_like: Any, write_rows: Callable[..., Path]
) -> None:
    with pytest.raises(DataError, match=r"all 5 rows are left out: `completion` is empty \(5\); "):
        prepared(opt_like, path=write_rows([{"prompt": "a", "completion": " "}] * 5))


def test_evaluation_rows_that_are_training_rows_are_counted(
    opt_like: Any, write_rows: Callable[..., Path]
) -> None:
    held_out = [{"prompt": "red", "completion": " fox"}, *ROWS[:4]]
    data = prepared(opt_like, path=write_rows(ROWS), eval_path=write_rows(held_out, "eval.jsonl"))
    assert data.report.overlap == 4
    assert any("overlap=4" in text for text in data.report.warnings)


def test_a_prompt_asked_twice_has_both_answers_as_references(
    opt_like: Any, write_rows: Callable[..., Path]
) -> None:
    held_out = [
        {"prompt": "red", "completion": " fox"},
        {"prompt": "blue", "completion": " sky"},
        {"prompt": "red", "completion": " cat"},
        {"prompt": "red", "completion": " fox "},
    ]
    data = prepared(opt_like, eval_path=write_rows(held_out))
    assert data.train == [] and len(data.eval) == 4
    assert [(p.answer, p.references) for p in data.prompts] == [
        ("fox", ("fox", "cat")),
        ("sky", ("sky",)),
    ]
    assert data.prompts[0].prompt_ids == opt_like("red")["input_ids"]


def test_a_split_is_whole_disjoint_and_follows_the_seed(
    opt_like: Any, write_rows: Callable[..., Path]
) -> None:
    path = write_rows(ROWS)

    def held_out(seed: int) -> set[str]:
        data = prepared(opt_like, seed, path=path, eval_fraction=0.25)
        train = {row.source for row in data.train}
        kept = {row.source for row in data.eval}
        assert len(kept) == 10 and not train & kept and len(train | kept) == 40
        return kept

    assert held_out(0) == held_out(0) != held_out(1)


def test_a_split_by_prompt_keeps_shared_prompts_on_one_side(
    opt_like: Any, write_rows: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"the cat {n // 4}", "completion": f" sat {n}"} for n in range(40)]
    path = write_rows(rows)
    for seed in range(5):
        data = prepared(opt_like, seed, path=path, eval_fraction=0.2, split_by="prompt")
        sides = [
            {tuple(row.input_ids[: row.prompt_length]) for row in side}
            for side in (data.train, data.eval)
        ]
        assert not sides[0] & sides[1] and len(data.eval) == 8


def test_one_row_cannot_be_split(opt_like: Any, write_rows: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="cannot be split"):
        prepared(opt_like, path=write_rows(ROWS[:1]), eval_fraction=0.5)


def test_the_fingerprint_follows_the_rows_and_not_the_path(
    opt_like: Any, write_rows: Callable[..., Path]
) -> None:
    one = prepared(opt_like, path=write_rows(ROWS)).fingerprint
    assert one == prepared(opt_like, path=write_rows(ROWS, "moved.jsonl")).fingerprint
    assert one != prepared(opt_like, path=write_rows(ROWS[::-1])).fingerprint
    assert one != prepared(opt_like, path=write_rows(ROWS), limit=39).fingerprint


def test_a_tokenizer_larger_than_the_model_is_a_model_error(
    opt_like: Any, write_rows: Callable[..., Path]
) -> None:
    with pytest.raises(ModelError, match="embeddings"):
        prepare_data(DataConfig(path=str(write_rows(ROWS))), opt_like, 20, 0)


def test_no_path_at_all_is_an_error(opt_like: Any) -> None:
    with pytest.raises(DataError, match=r"data\.path"):
        prepared(opt_like)


def test_the_format_kept_with_an_adapter_is_used_again(
    opt_like: Any, write_rows: Callable[..., Path]
) -> None:
    rows = [{"city": "Oslo", "completion": " Norway"}]
    trained = prepared(opt_like, path=write_rows(rows), template="Where is {city}?")
    kept = PromptFormat.from_dict(json.loads(json.dumps(trained.prompt_format.to_dict())))
    config = DataConfig(eval_path=str(write_rows(rows)))
    again = prepare_data(config, opt_like, len(opt_like), 0, prompt_format=kept)
    assert again.eval == trained.train


def test_the_package_imports_neither_torch_nor_transformers_nor_datasets() -> None:
    script = (
        "import sys, loratune.data.prepare, loratune.data.batches, loratune.data.packing;"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_thousands_of_real_rows_are_encoded_as_they_read(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "opt-bpe")
    path = shared / "data" / "e2e" / "train.jsonl"
    prepared(tokenizer, path=path, limit=8)
    data = prepared(tokenizer, path=path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(data.train) == len(rows) == 4672
    for row, encoded in zip(rows, data.train, strict=True):
        supervised = encoded.input_ids[encoded.prompt_length :]
        assert tokenizer.decode(supervised) == row["completion"] + "</s>"
        assert encoded.input_ids.count(2) == 2 and encoded.input_ids[0] == 2
