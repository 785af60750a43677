"""A file that is not what its manifest says is named with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loratune.runs.manifest import describe_files, file_problem


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.json").write_text("{}")
    return tmp_path / "here"


def test_a_described_file_has_no_problem(folder: Path) -> None:
    described = describe_files(folder.iterdir())
    assert list(described) == ["a.json"] and described["a.json"]["bytes"] == 2
    assert file_problem(folder, "a.json", described["a.json"]) == ""
    assert file_problem(folder, "a.json", described["a.json"]["sha256"]) == ""
    assert describe_files(folder.iterdir(), {"a.json": "abc"})["a.json"]["sha256"] == "abc"


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "removed": (Path.unlink, "is missing"),
    "longer": (lambda path: path.write_text("{} "), "has 3 bytes instead of 2"),
    "other bytes": (lambda path: path.write_text("[]"), "has another sha256"),
    "link": (replace_by_link, "leads elsewhere"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_described(folder: Path, kind: str) -> None:
    described = describe_files(folder.iterdir())["a.json"]
    damage, expected = DAMAGE[kind]
    damage(folder / "a.json")
    assert file_problem(folder, "a.json", described) == expected


def test_a_name_that_leaves_the_folder_is_never_read(folder: Path) -> None:
    (folder.parent / "b.json").write_text("{}")
    recorded = describe_files([folder.parent / "b.json"])["b.json"]
    assert file_problem(folder, "../b.json", recorded) == "leads elsewhere"
