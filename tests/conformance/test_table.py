"""docs/exactness.md lists every conformance case with the tests marked as its proof."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest
from support.exactness_page import PAGE, published

TESTS = Path(__file__).parents[1]
ROW = re.compile(r"^\| (\d+) \| [^|]+ \| ([^|]+) \| (.*) \|$", re.MULTILINE)
HOUSES = ("parity", "conformance", "interchange", "adapters", "counting")


def test_the_document_lists_every_case_with_the_tests_that_prove_it(
    request: pytest.FixtureRequest,
) -> None:
    """A case is a row of the document; ``@pytest.mark.case(number, tolerance)`` proves it."""
    items = [item for item in request.session.items if item.path.parent.name in HOUSES]
    files = {path for house in HOUSES for path in (TESTS / house).glob("test_*.py")}
    if files != {item.path for item in items} or request.config.option.keyword:
        pytest.skip("the marks are compared when all the suites that have them run")
    classes, tests = defaultdict(set), defaultdict(set)
    for item in items:
        for mark in item.iter_markers("case"):
            number, tolerance = mark.args
            classes[number].add(tolerance.name)
            tests[number].add(f"{item.path.relative_to(TESTS)}::{item.originalname}")
    rows = {int(number): rest for number, *rest in ROW.findall(PAGE.read_text(encoding="utf-8"))}
    assert sorted(rows) == list(range(1, 75)) and tests.keys() <= rows.keys()
    for number, (named, proofs) in rows.items():
        assert named == (" ".join(sorted(classes[number])) or "–"), number
        assert set(re.findall(r"`([^`]+)`", proofs)) == tests[number], number
        assert tests[number] or re.search(r"\*.+\*", proofs), f"case {number} needs a reason"


def test_the_document_shows_the_published_counts_that_the_command_prints() -> None:
    printed = published()
    assert printed.count("\n") > 100
    assert printed in PAGE.read_text(encoding="utf-8"), (
        "print the tables anew: python -m support.exactness_page (in tests/)"
    )
