"""``loratune report``: one self-contained HTML page about a run, a comparison or several runs."""

from __future__ import annotations

from pathlib import Path

from loratune.cli.arguments import read_arguments
from loratune.errors import ConfigError

HELP = """loratune report: one self-contained HTML page about a run, a comparison or several runs.

usage: loratune report DIR...|run=DIR [out=FILE]

DIR        a run folder, a comparison's folder, or a folder of runs
out=FILE   where to write; DIR/report.html for one folder, ./report.html for several
"""


def run(arguments: list[str]) -> None:
    """Write the page and print its path."""
    if not arguments:
        print(HELP, end="")
        return
    words, values = read_arguments(arguments, {"run": (), "out": ()})
    folders = [Path(word) for word in (*words, *filter(None, [values.get("run")]))]
    if not folders:
        raise ConfigError("which folder?", where="loratune report", fix="name a run's folder")
    out = values.get("out")
    from loratune.console import say
    from loratune.report.build import write_report

    say(f"report: {write_report(folders, Path(out) if out else None)}")
