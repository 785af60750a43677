from __future__ import annotations

from pathlib import Path

import pytest
from support.peft_oracle import PEFT_ABOUT_ITSELF


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for mark in PEFT_ABOUT_ITSELF:
                item.add_marker(mark)
