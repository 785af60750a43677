from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.peft_oracle import PEFT_ABOUT_ITSELF
from support.tiny_models import FAMILIES, save_base


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for mark in PEFT_ABOUT_ITSELF:
                item.add_marker(mark)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family to base folder, in fp32; head and embedding as the family has them."""
    root = tmp_path_factory.mktemp("bases")
    return {family: save_base(root / family, build()) for family, build in FAMILIES.items()}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training rows."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    for word in ("red", "blue", "green", "grey", "pink", "teal", "gold", "lime"):
        row = {"prompt": f"Say {word}.", "completion": f" {word} {word}"}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def build() -> Any:
    """Family to builder of the base in memory."""
    return FAMILIES
