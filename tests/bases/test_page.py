"""docs/bases.md says what the records say, in numbers and in cells."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bases_page", ROOT / "scripts/bases_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_one_that_the_last_records_give() -> None:
    bases_page = script()
    results = json.loads(bases_page.RESULTS.read_text(encoding="utf-8"))
    page = bases_page.page(results["records"], results["multimodal"], results["versions"])
    assert bases_page.PAGE.read_text(encoding="utf-8") == page


def test_every_record_has_its_row_and_is_counted() -> None:
    bases_page = script()
    empty = dict.fromkeys(["reason", *bases_page.COLUMNS, *bases_page.MULTIMODAL_COLUMNS], "")
    works = {**empty, "type": "one", "verdict": "works", "peft": "no: a | b", "packing": "exact"}
    refused = {**empty, "type": "two", "verdict": "refused", "reason": "not causal"}
    fails = {**empty, "type": "three", "verdict": "fails", "reason": "a traceback"}
    whole = {**works, "type": "four", "peft": "equal", "towers": "3 tensors equal"}
    records = [works, refused, refused, fails]
    lines = bases_page.page(records, [whole], {"torch": "2"}).splitlines()
    assert "Of 4 types (torch 2, CPU, fp32):" in lines and "| `three` | a traceback |" in lines
    assert lines.count("| `two` | not causal |") == 2
    assert "| `one` |  |  | no: a \\| b |  | exact |  |  |  |" in lines
    assert "| `four` |  |  | equal |  | exact |  |  |  |  | 3 tensors equal |" in lines
    assert [line for line in lines if line.startswith("- 2 ")] == [
        "- 2 are refused before the first step"
    ]
