"""Write a report into the folder it describes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from loratune import __version__, files
from loratune.errors import ConfigError
from loratune.report.page import render

REPORT = "report.html"
COMPARISON = "comparison.json"


def write_run_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder.

    Raises:
        ConfigError: if it is no run folder.
        StorageError: if it cannot be written.
    """
    from loratune.report.records import read_run
    from loratune.report.run_page import run_page

    return _write(folder / REPORT, render(run_page(read_run(folder), _footer())))


def write_comparison_report(folder: Path) -> Path:
    """Write ``report.html`` beside a ``comparison.json``.

    Raises:
        ConfigError: if that file is missing or damaged.
        StorageError: if it cannot be written.
    """
    from loratune.compare.result import Comparison
    from loratune.report.comparison_page import comparison_page

    path = folder / COMPARISON
    try:
        comparison = Comparison.from_dict(files.read_json(path))
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"the comparison cannot be read: {error}",
            where=str(path),
            fix="name a folder that `loratune compare` made",
        ) from error
    return _write(folder / REPORT, render(comparison_page(comparison, _footer())))


def write_runs_report(folders: Sequence[Path], target: Path) -> Path:
    """Write one page that sets several runs side by side.

    Raises:
        ConfigError: if one is no run folder.
        StorageError: if it cannot be written.
    """
    from loratune.report.records import read_run
    from loratune.report.runs_page import runs_page

    runs = [read_run(folder) for folder in folders]
    return _write(target, render(runs_page(runs, _footer())))


def _write(path: Path, page: str) -> Path:
    files.write_text(path, page)
    return path


def _footer() -> str:
    return f"Written by loratune {__version__} on {time.strftime('%Y-%m-%d %H:%M %Z')}."
