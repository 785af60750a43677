from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loratune.config.schema import DataConfig, SourceConfig, TrainerConfig
from loratune.data.arrangement import Arrangement
from loratune.data.cache import CheckedData, prepare_and_audit
from loratune.data.cached_rows import BLOCK, CachedRows, RowStore, row_lengths
from loratune.data.encoded_rows import EncodedRow
from loratune.data.training_set import TrainingSet
from loratune.errors import ConfigError
from tests.data.conftest import byte_level_tokenizer

DRAW = random.Random(5)
TOKENIZER = byte_level_tokenizer(start=True, pad=True)


def drawn_row(number: int) -> EncodedRow:
    length = DRAW.randint(2, 40)
    ids = [DRAW.randrange(50_000) for _ in range(length)]
    spans = ((1, 2), (3, length)) if length > 4 else ((1, length),)
    return EncodedRow(
        ids,
        spans,
        1,
        f"rows.jsonl:{number}",
        spelt=("<s>", "</s>") if number % 3 else (),
        left_out=number % 2,
        origin="ours" if number % 5 else "",
        unanswered=number % 4,
        unused_keys=("name",) if number % 7 == 0 else (),
        unsupervised=("its weight is 0",) if number % 2 else (),
        dropped_reasoning=number % 3,
        spelt_text=((1, 2),) if number % 2 else (),
    )


@pytest.mark.parametrize("count", [0, 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
def test_every_field_of_every_row_comes_back(tmp_path: Path, count: int) -> None:
    rows = [drawn_row(number) for number in range(count)]
    store = RowStore(tmp_path)
    for start in range(0, count, 100):
        store.add(rows[start : start + 100])
    cached = store.finished()
    assert list(cached) == rows
    assert cached[:] == rows
    assert len(cached) == count
    assert list(row_lengths(cached)) == [len(row) for row in rows]
    for place in DRAW.sample(range(count), min(count, 20)):
        assert cached[place] == rows[place]
        assert cached[place - count] == rows[place]
    with pytest.raises(IndexError):
        cached[count]


# -- prepared rows -------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("loratune.data.prepare.STREAMED_ROWS", 70)
    for name, first in (("train", 0), ("more", 500), ("eval", 800)):
        lines = (
            json.dumps({"prompt": f"{name} {n}? ", "completion": f"It is {n * n}." * (n % 4)})
            for n in range(first, first + 300)
        )
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def recipe(files: Path, **changes: Any) -> DataConfig:
    config = DataConfig(
        path=str(files / "train.jsonl"),
        eval_path=str(files / "eval.jsonl"),
        cache=str(files / "cache"),
        max_length=40,
    )
    return replace(config, **changes)


def prepared(config: DataConfig, seed: int = 0) -> CheckedData:
    return prepare_and_audit(config, TOKENIZER, 420, seed)


def entries(files: Path) -> list[Path]:
    return sorted((files / "cache").iterdir())


@pytest.mark.parametrize("mixed", [False, True])
def test_what_is_cached_is_what_was_prepared(files: Path, mixed: bool) -> None:
    config = recipe(files)
    if mixed:
        sources = [
            SourceConfig(path=str(files / f"{name}.jsonl"), name=name, weight=weight)
            for name, weight in (("train", 3), ("more", 1))
        ]
        config = recipe(files, path=None, sources=sources)
    fresh = prepared(replace(config, cache=None))
    for again in (prepared(config), prepared(config)):
        assert isinstance(again.data.train, CachedRows)
        assert list(again.data.train) == list(fresh.data.train)
        assert replace(again.data, train=[]) == replace(fresh.data, train=[])
        assert again.data.fingerprint == fresh.data.fingerprint
        assert again.audit == fresh.audit
    assert len(entries(files)) == 1
    trainer = TrainerConfig(steps=90, batch_size=8)
    plans = [
        TrainingSet.from_config(one.data.train, Arrangement(0), config, trainer)
        for one in (fresh, again)
    ]
    for step in range(90):
        ours, theirs = (plan.micro_batches(step) for plan in plans)
        assert [b.input_ids.tolist() for b in ours] == [b.input_ids.tolist() for b in theirs]


def test_a_later_start_does_not_encode(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(recipe(files))
    monkeypatch.setattr("loratune.data.cache.prepare_data", lambda *_, **__: pytest.fail("read"))
    assert len(prepared(recipe(files)).data.train) > 200


def test_whatever_changes_the_rows_is_another_entry(files: Path) -> None:
    prepared(recipe(files))
    prepared(recipe(files, max_length=30))
    prepared(recipe(files, limit=100))
    prepared(recipe(files, eval_path=None, eval_fraction=0.1))
    prepared(recipe(files, eval_path=None, eval_fraction=0.1), seed=1)
    assert len(entries(files)) == 5
    text, stat = (files / "train.jsonl").read_text(), (files / "train.jsonl").stat()
    (files / "train.jsonl").write_text(text.replace("It is 1.", "It is 2."))
    os.utime(files / "train.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as long, as old
    changed = prepared(recipe(files))
    assert len(entries(files)) == 6
    assert list(changed.data.train) == list(prepared(recipe(files, cache=None)).data.train)


@pytest.mark.parametrize(
    "name", ["prepared.json", "train/rows.arrow", "train/lengths.npy", "eval/rows.arrow"]
)
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_entry_is_made_again(files: Path, name: str, how: str) -> None:
    fresh = prepared(recipe(files))
    rows = list(fresh.data.train)
    victim = entries(files)[0] / name
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "remove":
        victim.unlink()
    else:
        victim.write_bytes(content if how == "flip" else content[: len(content) // 2])
    again = prepared(recipe(files))
    assert list(again.data.train) == rows
    assert len(entries(files)) == 1
    assert victim.is_file()


def test_rows_of_the_hub_cannot_be_kept(files: Path) -> None:
    with pytest.raises(ConfigError, match=r"'owner/rows' lies on the hub, and data\.cache keeps"):
        prepared(recipe(files, path="owner/rows"))
