"""Trials of bases; what became of all of them is written into results.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from bases.trial import try_base

RESULTS = Path(__file__).with_name("results.json")
_PROPERTY = "record of a base"
_RECORDS: dict[str, dict[str, str]] = {}


@pytest.fixture
def trial(
    tmp_path: Path, request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]
) -> Callable[[str], dict[str, str]]:
    """A function from a type to what became of a tiny base of it; its files stay if it fails."""

    def run(name: str) -> dict[str, str]:
        folder = tmp_path / "trial"
        folder.mkdir()
        record = try_base(name, folder)
        if record["verdict"] != "fails":
            shutil.rmtree(folder)
        if request.node.get_closest_marker("bases"):
            record_property(_PROPERTY, record)
        return record

    return run


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect records; with pytest-xdist, from every process."""
    if report.when == "call":
        _RECORDS.update({r["type"]: r for key, r in report.user_properties if key == _PROPERTY})


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the records, those of types that these versions did not try again among them."""
    if not _RECORDS or hasattr(session.config, "workerinput"):
        return
    versions = {name: version(name) for name in ("transformers", "peft", "torch")}
    last = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    before = last["records"] if last.get("versions") == versions else []
    records = {record["type"]: record for record in before} | _RECORDS
    lines = [json.dumps(records[name], ensure_ascii=False) for name in sorted(records)]
    head = f'{{"versions": {json.dumps(versions)},\n"records": [\n'
    RESULTS.write_text(head + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
