"""A comparison's folder shared by processes that may die."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from loratune.compare.store import CachedResult, Store
from loratune.errors import CheckpointError, SecurityError

TASK = {"base": "abc", "rows": {"train": "1"}}
RESULT = CachedResult("members", "lora", "seed-0", "f" * 64)


def test_a_result_is_read_back_by_any_process(tmp_path: Path) -> None:
    Store.open(tmp_path / "out", TASK).write(RESULT, {"loss": 0.5})
    assert Store.open(tmp_path / "out", TASK).read(RESULT) == {"loss": 0.5}


def test_what_depends_on_other_settings_is_another_file(tmp_path: Path) -> None:
    store = Store.open(tmp_path, TASK)
    store.write(RESULT, {"loss": 0.5})
    assert store.read(CachedResult("members", "lora", "seed-0", "e" * 64)) is None


@pytest.mark.parametrize("content", [b"", b'{"loss": 0.', b"[1]", b"\xff\xfe"])
def test_a_damaged_result_counts_as_missing(tmp_path: Path, content: bytes) -> None:
    store = Store.open(tmp_path, TASK)
    store.write(RESULT, {"loss": 0.5})
    (tmp_path / RESULT.file).write_bytes(content)
    assert Store.open(tmp_path, TASK).read(RESULT) is None


def test_a_folder_of_another_task_is_refused_with_what_differs(tmp_path: Path) -> None:
    Store.open(tmp_path, TASK)
    with pytest.raises(CheckpointError, match="rows differ") as refused:
        Store.open(tmp_path, {**TASK, "rows": {"train": "2"}})
    assert refused.value.exit_code == 6


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(SecurityError):
        Store.open(tmp_path / "link", TASK)


def test_a_forgotten_result_is_gone(tmp_path: Path) -> None:
    store = Store.open(tmp_path, TASK)
    store.write(RESULT, {"loss": 0.5})
    assert store.read(RESULT) is not None
    store.forget(RESULT)
    assert store.read(RESULT) is None
    assert store.finished() == []


def test_only_one_process_works_on_a_task(tmp_path: Path) -> None:
    store = Store.open(tmp_path, TASK)
    with store.claim(RESULT) as mine:
        assert mine == 0
        with Store.open(tmp_path, TASK).claim(RESULT) as theirs:
            assert theirs is None
    with store.claim(RESULT) as again:
        assert again == 0


def _die_on(store: Store) -> None:
    """Claim the task in a child and kill it there."""
    child = os.fork()
    if child == 0:
        with store.claim(RESULT):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_dead_process_frees_its_task_and_is_counted(tmp_path: Path) -> None:
    store = Store.open(tmp_path, TASK)
    for deaths in (1, 2, 3):
        _die_on(store)
        # Looking must not count as dying, so the claim is left without an end.
        assert len((tmp_path / ".claims" / "members_lora_seed-0-ffffffffff").read_text()) == deaths
    with store.claim(RESULT) as died:
        assert died == 3
    with store.claim(RESULT) as died:
        assert died == 0


def test_results_of_every_kind_are_found_and_claims_are_not(tmp_path: Path) -> None:
    store = Store.open(tmp_path, TASK)
    results = [
        RESULT,
        CachedResult("base", "", "scores", "a" * 64),
        CachedResult("costs", "lora", "costs", "b"),
    ]
    for result in results:
        with store.claim(result):
            store.write(result, {"seconds": 1.0})
    assert store.finished() == [{"seconds": 1.0}] * 3
