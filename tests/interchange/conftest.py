from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.command_line import CommandLine, write_rows
from support.peft_oracle import PEFT_ABOUT_ITSELF
from support.tiny_models import FAMILIES, save_base


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for mark in PEFT_ABOUT_ITSELF:
                item.add_marker(mark)


@pytest.fixture
def cli(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    """The command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return CommandLine(tmp_path, capsys)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family to base folder, in fp32; head and embedding as the family has them."""
    root = tmp_path_factory.mktemp("bases")
    return {family: save_base(root / family, build()) for family, build in FAMILIES.items()}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training rows."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture
def build() -> Any:
    """Family to builder of the base in memory."""
    return FAMILIES
