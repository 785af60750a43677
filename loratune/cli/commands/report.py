"""``loratune report``: one self-contained HTML page about a run, a comparison or several runs."""

from __future__ import annotations

from pathlib import Path

from loratune.errors import ConfigError

USAGE = """loratune report: one self-contained HTML page about a run, a comparison or several runs.

usage: loratune report DIR... [out=FILE]

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
    folders, out = [], None
    for word in arguments:
        key, is_setting, value = word.partition("=")
        if is_setting and key == "out":
            out = Path(value)
        elif word.startswith("-") or (is_setting and not Path(word).exists()):
            raise ConfigError(
                f"no setting '{key}'", where=word, fix="use: loratune report DIR... [out=FILE]"
            )
        else:
            folders.append(Path(word))
    if not folders:
        raise ConfigError("which folder?", where="loratune report", fix="name a run's folder")
    return folders, out
