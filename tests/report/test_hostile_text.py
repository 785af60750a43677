"""Text from data stays text: the parsed page has the elements of the template and no others."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loratune import files
from loratune.report.build import write_report, write_runs_report

from .planted import EVERYTHING_HOSTILE, HOSTILE, comparison, write_run

# Every element and attribute that the templates and drawings make; data may add none.
ELEMENT_NAMES = (
    "html head meta title style body header p h1 h2 h3 div ul li b span nav a main section table "
    "thead tbody tr th td figure figcaption details summary dl dt dd pre footer svg g line text "
    "circle polygon polyline rect"
)
ATTRIBUTE_NAMES = (
    "lang charset http-equiv content name class id href scope tabindex role aria-label viewbox "
    "x y x1 x2 y1 y2 cx cy r width height points transform text-anchor stroke-dasharray"
)
ELEMENTS, ATTRIBUTES = set(ELEMENT_NAMES.split()), set(ATTRIBUTE_NAMES.split())


class Parsed(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.policies: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        values = dict(attrs)
        self.attributes |= values.keys()
        self.links += [str(values[name]) for name in ("href", "src") if name in values]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policies.append(str(values["content"]))

    def handle_data(self, data: str) -> None:
        self.text += data


def run_page(folder: Path, text: str, name: str = "plain") -> Parsed:
    run = write_run(
        folder / name, text=text, module=text, variant=text, name=text, recipe={"note": text}
    )
    return Parsed(write_report([run]).read_text(encoding="utf-8"))


def comparison_page(folder: Path, text: str) -> Parsed:
    folder.mkdir()
    files.write_json(folder / "comparison.json", comparison(text=text, label=text).to_dict())
    return Parsed(write_report([folder]).read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", [*HOSTILE, EVERYTHING_HOSTILE], ids=range(len(HOSTILE) + 1))
def test_hostile_rows_names_and_paths_add_no_element(tmp_path: Path, text: str) -> None:
    harmless = run_page(tmp_path, "x" * len(text), "harmless")
    hostile = run_page(tmp_path, text, "hostile")
    assert hostile.elements == harmless.elements
    assert set(hostile.elements) <= ELEMENTS
    assert hostile.attributes <= ATTRIBUTES
    assert all(re.fullmatch("#[a-z]+", link) for link in hostile.links)


@pytest.mark.parametrize("text", [*HOSTILE, EVERYTHING_HOSTILE], ids=range(len(HOSTILE) + 1))
def test_hostile_labels_and_findings_add_no_element(tmp_path: Path, text: str) -> None:
    hostile = comparison_page(tmp_path / "hostile", text)
    harmless = comparison_page(tmp_path / "harmless", "x" * 12)
    drawn = {
        "svg",
        "text",
        "g",
        "line",
        "title",
    }  # legends wrap, names that do not fit are left out
    kept = {tag: n for tag, n in hostile.elements.items() if tag not in drawn}
    assert kept == {tag: n for tag, n in harmless.elements.items() if tag not in drawn}
    assert set(hostile.elements) <= ELEMENTS
    assert hostile.attributes <= ATTRIBUTES


def test_several_hostile_runs_add_no_element(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(n), variant=text, text=text) for n, text in enumerate(HOSTILE)]
    page = Parsed(write_runs_report(runs, tmp_path / "all.html").read_text(encoding="utf-8"))
    assert set(page.elements) <= ELEMENTS
    assert page.attributes <= ATTRIBUTES


def test_template_syntax_in_data_is_shown_literally(tmp_path: Path) -> None:
    page = run_page(tmp_path, "{{7*7}}")
    assert "{{7*7}}" in page.text
    assert "49 on" not in page.text


def test_control_characters_are_made_visible(tmp_path: Path) -> None:
    page = run_page(tmp_path, "\x1b[31mred\x07\u202eabc")
    assert "\\x1b[31mred\\x07\\u202eabc" in page.text
    assert not set("\x1b\x07\u202e") & set(page.text)


def test_the_policy_allows_the_one_style_sheet_and_nothing_else(tmp_path: Path) -> None:
    page = run_page(tmp_path, "plain")
    (policy,) = page.policies
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/=]{44}'", directives["style-src"])
    assert set(directives) == {"default-src", "style-src", "base-uri", "form-action"}


def test_no_address_outside_the_page_is_named(tmp_path: Path) -> None:
    page = write_report([write_run(tmp_path / "run")]).read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)


def test_secrets_in_a_recipe_are_hidden(tmp_path: Path) -> None:
    recipe = {"hf_token": "hf_abcdefghijklmnopqrst", "data": {"path": "https://me:pw123@host/x"}}
    run = write_run(tmp_path / "run", recipe=recipe)
    page = write_report([run]).read_text(encoding="utf-8")
    assert "hf_abcdefghijklmnopqrst" not in page
    assert "pw123" not in page
