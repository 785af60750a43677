"""Files are nobody else's to write, and nothing that lies in wait under their names is followed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from loratune import files
from loratune.cli.dispatch import dispatch
from loratune.errors import BusyError, StorageError
from loratune.runs.lock import FolderLock
from loratune.runs.records import append_line


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_under_an_open_umask_nothing_can_be_written_by_others(
    open_umask: None, tmp_path: Path
) -> None:
    files.write_text(tmp_path / "a.json", "{}")
    append_line(tmp_path / "lines.jsonl", {"step": 1})
    lock = FolderLock(tmp_path / ".lock")
    lock.hold()
    lock.release()
    with files.published_folder(tmp_path / "folder") as target:
        (target / "inside").mkdir()
        (target / "inside" / "b.json").write_text("{}")
    made = list(tmp_path.rglob("*"))
    assert len(made) == 6
    assert [path for path in made if mode(path) & 0o022] == []


def test_the_command_line_restricts_what_libraries_write(open_umask: None) -> None:
    dispatch("recipes", ["ls"])
    assert os.umask(0) == 0o022


def test_a_stricter_umask_stays(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        files.restrict_modes()
        files.write_text(tmp_path / "a", "")
        assert mode(tmp_path / "a") == 0o600
    finally:
        os.umask(before)


def test_temporary_names_cannot_be_guessed_and_are_found_again(tmp_path: Path) -> None:
    names = {files.temporary_name(tmp_path / "a").name for _ in range(100)}
    assert len(names) == 100 and not any(str(os.getpid()) == n.rpartition("-")[2] for n in names)
    (tmp_path / names.pop()).touch()
    (tmp_path / ".tmp-a-1234").touch()  # as earlier versions named them
    files.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_link_planted_under_a_temporary_name_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0" * 16)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".tmp-a.json-{'0' * 16}").symlink_to(victim)
    with pytest.raises(StorageError):
        files.write_text(tmp_path / "a.json", "theirs")
    assert victim.read_text() == "mine" and not (tmp_path / "a.json").exists()


def test_what_lies_under_a_temporary_name_is_neither_overwritten_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / "planted"
    planted.write_text("somebody else's")
    monkeypatch.setattr(files, "temporary_name", lambda path: planted)
    with pytest.raises(StorageError):
        files.write_text(tmp_path / "a.json", "{}")
    assert planted.read_text() == "somebody else's"
    assert not (tmp_path / "a.json").exists()


def test_links_planted_as_records_or_lock_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("metrics.jsonl", ".lock"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(StorageError):
        append_line(tmp_path / "metrics.jsonl", {"step": 1})
    with pytest.raises(StorageError):
        FolderLock(tmp_path / ".lock").hold()
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    "out", ["base", "base/run", "base/a/b", "link", "link/run", "base/../base"]
)
def test_an_output_inside_a_model_is_refused_through_links_too(tmp_path: Path, out: str) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    with pytest.raises(BusyError, match="lies inside"):
        files.check_outside(tmp_path / out, tmp_path / "base")
    files.check_outside(tmp_path / "base-2", tmp_path / "base")


def test_a_folder_that_another_process_wrote_meanwhile_is_said_to_be_busy(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(BusyError, match="another process wrote"),
        files.published_folder(out) as new,
    ):
        (new / "ours").touch()
        out.mkdir()
        (out / "theirs").touch()
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_is_gone_when_it_is_to_be_replaced_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with files.published_folder(out, replace=True) as new:
        (new / "ours").touch()
        out.rename(tmp_path / "elsewhere")
    assert [path.name for path in out.iterdir()] == ["ours"]
