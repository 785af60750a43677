"""``data.sources`` as typed or written: names, and every fault of the list in one go."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from loratune.cli.dispatch import dispatch
from loratune.config.mixture import source_name

RECIPE = "recipe=instruct"


def composed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, list[str]]:
    capsys.readouterr()
    code = dispatch("train", [*words, "--cfg", "job"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    capsys.readouterr()
    assert dispatch("train", list(words)) in (2, 3)
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"path": "data/rows.jsonl"}, "rows"),
        ({"path": "rows.v2.jsonl.gz"}, "rows.v2"),
        ({"path": "folder/"}, "folder"),
        ({"path": "builtin:train"}, "train"),
        ({"path": "owner/set"}, "set"),
        ({"path": "rows.jsonl", "name": "replay"}, "replay"),
    ],
)
def test_a_source_is_called_by_its_file_unless_it_has_a_name(
    source: dict[str, str], name: str
) -> None:
    assert source_name(source) == name


def test_sources_take_the_place_of_a_path_that_had_to_be_set(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "data.sources=[{path: a.jsonl, weight: 3}, {path: b.jsonl, columns: {prompt: q}}]"
    Path("a.jsonl").touch()
    Path("b.jsonl").touch()
    code, out, err = composed(capsys, RECIPE, words)
    assert (code, err) == (0, [])
    first, second = yaml.safe_load(out)["data"]["sources"]
    assert first["weight"] == 3 and second["weight"] == 1
    assert second["columns"] == {"prompt": "q"} and first["columns"] is None
    # Composed and typed: what stops it is that the files have no rows.
    [line] = [one for one in refused(capsys, "recipe=smoke", "data.path=null", words) if "a'" in one
              or "a.jsonl" in one]  # fmt: skip
    assert line.startswith("error[3] 'a.jsonl' has 0 rows; data.sources.a.path")


def test_every_fault_of_the_list_is_told_in_one_go(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.jsonl").touch()
    words = (
        "data.sources=[{path: a.jsonl, wieght: 3}, {path: aa.jsonl, weight: 0}, "
        "{path: x/a.csv}, {weight: -1}, {path: b?.jsonl}, {path: a.tsv, weight: many, limit: 0}]"
    )
    lines = refused(capsys, RECIPE, words)
    for said in [
        "'data.sources[0].wieght' is not a setting; data.sources[0].wieght; did you mean 'weight'?",
        "0 is out of range; data.sources[1].weight; use a number above 0",
        "-1 is out of range; data.sources[3].weight",
        "data.sources[3] has no path",
        "'b?' cannot name a source; data.sources[4]",
        "data.sources[5].weight must be a number, got 'many'",
        "0 is out of range; data.sources[5].limit",
        "3 sources are called 'a'; data.sources[0], data.sources[2], data.sources[5]",
        "error[3] no file 'aa.jsonl'; data.sources[1].path; did you mean 'a.jsonl'?",
        "error[3] no file 'x/a.csv'; data.sources[2].path",
        "error[3] no file 'a.tsv'; data.sources[5].path",
    ]:
        assert len([line for line in lines if said in line]) == 1, (said, lines)
    assert len(lines) == 11


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe=demo", "data.sources=[{path: builtin:dev}]"], "exclude each other; data; add "
         "data.path=null"),
        ([RECIPE, "data.sources=[]"], "data.sources is empty"),
        ([RECIPE, "data.sources=[a.jsonl]"], "data.sources[0] must be a mapping of settings"),
        ([RECIPE, "data.sources=a.jsonl"], "data.sources must be a list of mappings"),
        ([RECIPE], "there are no rows to train on"),
    ],
)  # fmt: skip
def test_one_clear_line_for_each(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    [line] = refused(capsys, *words)
    assert line.startswith("error[2]") and said in line


def test_a_recipe_file_names_the_line_of_an_unknown_key(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path("recipes/data")
    folder.mkdir(parents=True)
    text = "sources:\n  - path: builtin:train\n    wieght: 2\n  - {path: builtin:dev, weight: -2}\n"
    (folder / "mixed.yaml").write_text(text)
    [line] = refused(capsys, "recipe=smoke", "data=mixed")
    assert "'data.sources[0].wieght' is not a setting; recipes/data/mixed.yaml:3" in line
    (folder / "mixed.yaml").write_text(text.replace("wieght", "weight"))
    [line] = refused(capsys, "recipe=smoke", "data=mixed")
    assert "-2.0 is out of range; data.sources[1].weight" in line


def test_an_element_has_no_key_of_its_own_in_a_recipe_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path("recipes/data")
    folder.mkdir(parents=True)
    (folder / "odd.yaml").write_text("sources[0]:\n  path: a.jsonl\n")
    [line] = refused(capsys, "recipe=smoke", "data=odd")
    assert "'data.sources[0]' is not a setting; recipes/data/odd.yaml:1; did you mean" in line
