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
_RECORDS: dict[str, dict[str, dict[str, str]]] = {"records": {}, "multimodal": {}}
"""Records by type, under their key in results.json."""


@pytest.fixture
def trial(
    tmp_path: Path, request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]
) -> Callable[..., dict[str, str]]:
    """A function from a type to what became of a tiny base of it; its files stay if it fails."""

    is_recorded = request.node.get_closest_marker("bases") is not None

    def run(name: str, *, multimodal: bool = False) -> dict[str, str]:
        folder = tmp_path / "trial"
        folder.mkdir()
        record = try_base(name, folder, multimodal=multimodal, every_command=is_recorded)
        if record["verdict"] != "fails":
            shutil.rmtree(folder)
        if is_recorded:
            record_property("multimodal" if multimodal else "records", record)
        return record

    return run


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect records; with pytest-xdist, from every process."""
    if report.when == "call":
        for key, record in report.user_properties:
            if key in _RECORDS:
                _RECORDS[key][record["type"]] = record


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the records, those of types that these versions did not try again among them."""
    if not any(_RECORDS.values()) or hasattr(session.config, "workerinput"):
        return
    versions = {name: version(name) for name in ("transformers", "peft", "torch")}
    last = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    parts = [f'{{"versions": {json.dumps(versions)}']
    for key, tried in _RECORDS.items():
        before = last.get(key, []) if last.get("versions") == versions else []
        records = {record["type"]: record for record in before} | tried
        lines = [json.dumps(records[name], ensure_ascii=False) for name in sorted(records)]
        parts.append(f'"{key}": [\n' + ",\n".join(lines) + "\n]")
    RESULTS.write_text(",\n".join(parts) + "}\n", encoding="utf-8")
