"""Write a report into the folder it describes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from loratune import __version__, files
from loratune.compare.result import Comparison
from loratune.errors import ConfigError, LoratuneError, StorageError
from loratune.report.comparison_page import comparison_page
from loratune.report.page import render
from loratune.report.records import read_run
from loratune.report.run_page import run_page
from loratune.report.runs_page import runs_page
from loratune.runs.output import RECIPE
from loratune.runs.run_dir import PAGE, check_result_file

COMPARISON = "comparison.json"


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of what ``folders`` hold: a run, a comparison or several runs.

    A folder that is neither but has runs in it stands for them.

    Returns:
        The page: ``out`` if given, else ``report.html`` in the one folder, or in the working
        folder for several.

    Raises:
        ConfigError: if a folder holds nothing to report.
        StorageError: if the page cannot be written.
    """
    try:
        return _write_report(folders, out)
    except LoratuneError:
        raise
    except Exception as error:  # records that somebody changed may hold anything
        raise ConfigError(
            f"the records cannot be drawn: {type(error).__name__}: {error}",
            where=", ".join(map(str, folders)),
            fix="see what is damaged with `loratune verify DIR`",
        ) from error


def _write_report(folders: Sequence[Path], out: Path | None) -> Path:
    compared = [folder for folder in folders if (folder / COMPARISON).is_file()]
    if compared and len(folders) > 1:
        raise ConfigError(
            "a comparison has a page of its own", where=str(compared[0]), fix="name it alone"
        )
    if compared:
        return write_comparison_report(compared[0], out)
    runs = [run for folder in folders for run in _runs_in(folder)]
    if len(runs) == 1:
        return write_run_report(runs[0], out)
    return write_runs_report(runs, out or Path(PAGE))


def _runs_in(folder: Path) -> list[Path]:
    if (folder / RECIPE).is_file():
        return [folder]
    inside = sorted({path.parent.resolve() for path in folder.glob(f"*/{RECIPE}")})
    if not inside:
        raise ConfigError(
            "neither a run nor a comparison is here",
            where=str(folder),
            fix="name a folder that `loratune train` or `loratune compare` made",
        )
    return inside


def write_run_report(folder: Path, out: Path | None = None) -> Path:
    """Write a run's page, by default as ``report.html`` in its folder.

    Raises:
        ConfigError: if it is not a run folder.
        StorageError: if it cannot be written.
    """
    return _write(out or folder / PAGE, render(run_page(read_run(folder), footer())))


def finished_report(folder: Path) -> Path:
    """The page of a run that has just been published whole.

    Raises:
        StorageError: if the page cannot be made; the run itself is complete, and the error says so.
    """
    try:
        return write_run_report(folder)
    except Exception as error:  # whatever it is, nobody may believe that the run was lost
        raise StorageError(
            f"the run is complete and saved, but its report could not be written: {error}",
            where=str(folder),
            fix=f"write it again: loratune report {folder}",
        ) from error


def write_comparison_report(folder: Path, out: Path | None = None) -> Path:
    """Write a comparison's page, by default beside its ``comparison.json``.

    Raises:
        ConfigError: if that file is missing or damaged.
        StorageError: if it cannot be written.
    """
    path = folder / COMPARISON
    try:
        comparison = Comparison.from_dict(files.read_json(path))
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"the comparison cannot be read: {error}",
            where=str(path),
            fix="name a folder that `loratune compare` made",
        ) from error
    return _write(out or folder / PAGE, render(comparison_page(comparison, footer())))


def write_runs_report(folders: Sequence[Path], out: Path) -> Path:
    """Write one page that sets several runs side by side.

    Raises:
        ConfigError: if one is not a run folder.
        StorageError: if it cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    return _write(out, render(runs_page(runs, footer())))


def _write(path: Path, page: str) -> Path:
    check_result_file(path)
    with files.storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, page)
    return path


def footer() -> str:
    """When a page was written, and by what."""
    return f"Written by loratune {__version__} on {time.strftime('%Y-%m-%d %H:%M %Z')}."
