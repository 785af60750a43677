"""docs/exactness.md lists every case with the tests that prove it."""

from __future__ import annotations

from support.conformance import ELSEWHERE, NOTES, TESTS, TITLES, proofs, table
from support.exactness_page import published

DOCUMENT = TESTS.parent / "docs" / "exactness.md"


def test_every_case_has_a_test_or_a_reason() -> None:
    proved = {proof.case for proof in proofs()} | set(ELSEWHERE)
    assert sorted(TITLES) == list(range(1, 75))
    assert sorted(proved | set(NOTES)) == sorted(TITLES)
    assert all((TESTS / file).is_file() for files in ELSEWHERE.values() for file, _ in files)


def test_the_document_shows_the_table_of_these_tests() -> None:
    assert table() in DOCUMENT.read_text(encoding="utf-8"), (
        "print the table anew: python -m support.exactness_page (in tests/)"
    )


def test_the_document_shows_the_published_counts_that_the_command_prints() -> None:
    printed = published()
    assert printed.count("\n") > 100
    assert printed in DOCUMENT.read_text(encoding="utf-8"), (
        "print the tables anew: python -m support.exactness_page (in tests/)"
    )
