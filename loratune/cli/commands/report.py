"""``loratune report``: one self-contained HTML page about a run, a comparison or several runs."""

from __future__ import annotations

from pathlib import Path

from loratune.cli.arguments import read_arguments
from loratune.errors import ConfigError

HELP = """loratune report: one self-contained HTML page about a run, a comparison or several runs.

usage: loratune report DIR... [out=FILE]

DIR        a run folder, a comparison's folder, or a folder of runs
out=FILE   where to write; DIR/report.html for one folder, ./report.html for several
"""


def run(arguments: list[str]) -> None:
    """Write the page and print its path."""
    if not arguments:
        print(HELP, end="")
        return
    names, values = read_arguments(arguments, {"out": ()})
    if not names:
        raise ConfigError("which folder?", where="loratune report", fix="name a run's folder")
    folders, out = [Path(name) for name in names], values.get("out")
    from loratune.console import say
    from loratune.report.build import write_report

    say(f"report: {write_report(folders, Path(out) if out else None)}")
