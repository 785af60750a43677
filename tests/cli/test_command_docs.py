"""The pages of docs/commands say what the commands say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pages(monkeypatch) -> dict[Path, str]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    sys.modules.pop("make_command_docs", None)
    import make_command_docs

    return make_command_docs.pages()


def test_every_page_is_up_to_date(pages):
    stale = [
        path.name
        for path, text in pages.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    assert stale == [], "run: python scripts/make_command_docs.py"


def test_there_is_no_page_of_a_command_that_is_gone(pages):
    assert set((ROOT / "docs" / "commands").glob("*.md")) == set(pages)


def test_every_setting_says_what_it_means():
    from loratune.cli.settings_help import all_settings

    silent = [key for key, _, text in all_settings() if not text]
    assert silent == []


def test_own_settings_of_a_command_are_in_its_help():
    from loratune.cli.commands.count_params import Config
    from loratune.cli.settings_help import own_settings
    from loratune.config.schema import RunConfig

    lines = own_settings(Config).splitlines()
    assert any(
        line.startswith("  rank=null ") and "Rank of every variant" in line for line in lines
    )
    assert not any("trainer" in line.split("=")[0] for line in lines)
    assert own_settings(RunConfig) == ""
