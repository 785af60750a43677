from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.config.schema import DataConfig, Overlong, SourceConfig, TrainerConfig
from loratune.data import prepare
from loratune.data.arrangement import Arrangement
from loratune.data.cache import CheckedData, prepare_and_audit
from loratune.data.cached_rows import BLOCK, CachedRows, RowStore, row_lengths
from loratune.data.encoded_rows import EncodedRow
from loratune.data.training_set import TrainingSet
from loratune.errors import ConfigError, DataError, LoratuneError, StorageError
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
    # The first block alone has rows of the evaluation, and the longest ones.
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    shared = held_out.read_text().splitlines()[:8]
    long = [json.dumps({"prompt": "How long? ", "completion": "Long." * n}) for n in range(9, 40)]
    train.write_text("\n".join([*shared, *long, train.read_text()]))
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


def test_evaluation_rows_alone_need_no_cache(files: Path) -> None:
    only = recipe(files, path=None)
    assert prepared(only).data == prepared(replace(only, cache=None)).data
    assert not (files / "cache").exists()


def spoilt(files: Path) -> dict[str, Any]:
    rows = (files / "train.jsonl").read_text().splitlines()
    for place in (75, 150, 152, 154, 250, 252, 254):  # in the second, third and fourth block
        rows[place] = json.dumps({"prompt": "x", "completion": {"no": "text"}})
    (files / "train.jsonl").write_text("\n".join(rows))
    return {}


def missing(files: Path) -> dict[str, Any]:
    return {"eval_path": str(files / "evil.jsonl")}


def unreadable_source(files: Path) -> dict[str, Any]:
    (files / "rows.txt").touch()
    paths = (files / "train.jsonl", files / "rows.txt")
    return {"path": None, "sources": [SourceConfig(path=str(path)) for path in paths]}


def overlong(files: Path) -> dict[str, Any]:
    return {"max_length": 20, "overlong": Overlong.error}


@pytest.mark.parametrize("fault", [spoilt, missing, unreadable_source, overlong])
def test_what_is_wrong_is_said_as_without_a_cache(files: Path, fault: Any) -> None:
    config = recipe(files, **fault(files))
    with pytest.raises(LoratuneError) as plain:
        prepared(replace(config, cache=None))
    with pytest.raises(LoratuneError) as cached:
        prepared(config)
    assert cached.value.lines() == plain.value.lines()
    assert not (files / "cache").exists() or not entries(files)


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (files / "train.jsonl").read_text()
    encode = prepare.Encoder.encode_some

    def written_meanwhile(*args: Any, **options: Any) -> Any:
        (files / "new.jsonl").write_text(text.replace("It is", "It was"))
        os.replace(files / "new.jsonl", files / "train.jsonl")  # who has it open reads on
        return encode(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(prepare.Encoder, "encode_some", written_meanwhile)
        with pytest.raises(DataError, match="changed while it was read"):
            prepared(recipe(files))
    assert not entries(files)
    again = prepared(recipe(files))
    assert list(again.data.train) == list(prepared(recipe(files, cache=None)).data.train)


def _build(config: DataConfig, ready: Any, counts: Any) -> None:
    """Prepare rows, and publish them once every process has got so far."""
    fingerprint = prepare.data_fingerprint

    def together(rows: Any) -> str:
        ready.wait()
        return fingerprint(rows)

    prepare.data_fingerprint = together
    counts.put(len(prepared(config).data.train))


@pytest.mark.parametrize("damaged", [False, True])
def test_two_runs_that_build_one_entry_both_go_on(files: Path, damaged: bool) -> None:
    config = recipe(files)
    count = len(prepared(config).data.train)
    if damaged:
        (entries(files)[0] / "train" / "rows.arrow").write_bytes(b"damaged")
    else:
        shutil.rmtree(files / "cache")
    context = multiprocessing.get_context("fork")
    ready, counts = context.Barrier(2, timeout=60), context.Queue()
    runs = [context.Process(target=_build, args=(config, ready, counts)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert [counts.get(), counts.get()] == [count, count]
    assert len(entries(files)) == 1


def test_a_cache_that_cannot_be_written_names_its_setting(files: Path) -> None:
    (files / "cache").write_text("a file")
    with pytest.raises(StorageError, match=r"File exists; .*; choose a writable .*data\.cache=DIR"):
        prepared(recipe(files))


def test_rows_are_there_although_their_folder_is_removed(files: Path) -> None:
    data = prepared(recipe(files)).data
    shutil.rmtree(files / "cache")
    assert list(data.train) == list(prepared(recipe(files, cache=None)).data.train)


def _fail_together(config: DataConfig, number: int, meeting: str, errors: Any) -> None:
    """One of two processes of a run whose main one cannot write."""
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=number, world_size=2)
    try:
        prepared(config)
    except LoratuneError as error:
        errors.put(error.lines())
    torch.distributed.destroy_process_group()


def test_every_process_of_a_run_is_told_what_is_wrong(files: Path) -> None:
    (files / "cache").write_text("a file")
    config = recipe(files)
    with pytest.raises(StorageError) as alone:
        prepared(config)
    context = multiprocessing.get_context("fork")
    errors, meeting = context.Queue(), str(files / "meeting")
    runs = [
        context.Process(target=_fail_together, args=(config, number, meeting, errors))
        for number in range(2)
    ]
    for run in runs:
        run.start()
    told = [errors.get(timeout=60) for _ in runs]
    for run in runs:
        run.join()
    assert told == [alone.value.lines()] * 2
