"""``loratune report``: one self-contained HTML page about a run, a comparison or several runs."""

from __future__ import annotations

from pathlib import Path

from loratune.cli.words import split_words
from loratune.errors import ConfigError

USAGE = """loratune report: one self-contained HTML page about a run, a comparison or several runs.

usage: loratune report DIR...|run=DIR [out=FILE]

DIR        a run folder, a comparison's folder, or a folder of runs
out=FILE   where to write; DIR/report.html for one folder, ./report.html for several
"""


def run(arguments: list[str]) -> None:
    """Write the page and print its path."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return
    folders, out = _read(arguments)
    from loratune.console import say
    from loratune.report.build import write_report

    say(f"report: {write_report(folders, out)}")


def _read(arguments: list[str]) -> tuple[list[Path], Path | None]:
    """Folders and ``out``; a word that exists is a folder, also with ``=`` in its name."""
    existing = [word for word in arguments if Path(word).exists()]
    others = [word for word in arguments if word not in existing]
    plain, values = split_words(others, ("run", "out"))
    runs = [values["run"]] if "run" in values else []
    folders = [Path(word) for word in (*existing, *plain, *runs)]
    if not folders:
        raise ConfigError("which folder?", where="loratune report", fix="name a run's folder")
    return folders, Path(values["out"]) if "out" in values else None
