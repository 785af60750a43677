"""Write docs/commands/: one page per command from its real --help, and one of all settings.

usage: python scripts/make_command_docs.py [--check]

Text below the line `<!-- notes -->` of a page is written by hand and stays.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "commands"
MARK = "<!-- notes -->"
_FROM, _TO = "Groups, and what to choose from", "Flags:"


def help_of(command: str) -> str:
    """What `loratune COMMAND --help` prints, without the listings of a recipe."""
    from loratune.cli.dispatch import dispatch

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        dispatch(command, ["--help"])
    text = output.getvalue().strip()
    if _FROM in text:
        before, after = text.split(_FROM, 1)
        text = f"{before}{_TO}{after.rsplit(_TO, 1)[1]}"
    return "\n".join(line.rstrip() for line in text.splitlines())


def command_page(command: str, notes: str) -> str:
    """The page of one command."""
    from loratune.cli import COMMANDS

    lines = [
        f"# loratune {command}",
        "",
        COMMANDS[command][:1].upper() + COMMANDS[command][1:] + ".",
    ]
    lines += ["", "```text", help_of(command), "```", ""]
    if _TO in help_of(command):
        others = "It also takes every group (`loratune recipes ls`) and setting of a recipe"
        lines += [f"{others}: [settings](settings.md).", ""]
    lines += [MARK, "", notes]
    return "\n".join(lines).rstrip() + "\n"


def settings_page() -> str:
    """Every setting of a recipe, and of each variant, with default and meaning."""
    from loratune.adapters.config import AdapterConfig
    from loratune.adapters.registry import config_class, variant_names
    from loratune.cli.settings_help import all_settings, field_docs

    lines = [
        "# Settings of a recipe",
        "",
        "Type them as `key=value`, or write them in a recipe.",
        "",
    ]
    lines += _table(all_settings())
    for title, cls in [
        ("every variant", AdapterConfig),
        *((name, config_class(name)) for name in variant_names()),
    ]:
        docs = field_docs(cls)
        rows = [(f"adapter.{name}", "", text) for name, text in docs.items() if name != "variant"]
        if rows:
            lines += ["", f"## adapter: {title}", "", *_list(rows)]
    lines += ["", "Defaults of the variants are in their recipes: `loratune recipes show vera`."]
    return "\n".join(lines) + "\n"


def _table(rows: Iterator[tuple[str, str, str]]) -> list[str]:
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for key, default, text in rows:
        shown = f"`{default}`" if default else ""
        lines.append(f"| `{key}` | {shown} | {_plain(text)} |")
    return lines


def _list(rows: list[tuple[str, str, str]]) -> list[str]:
    return [f"- `{key}`: {_plain(text)}" for key, _, text in rows]


def _plain(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def plan_accuracy() -> str:
    """The measured error of `plan`, as a table."""
    path = ROOT / "benchmarks" / "results" / "plan_memory.json"
    if not path.is_file():
        return ""
    record = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "## How far to trust the memory",
        "",
        f"`python benchmarks/plan_memory.py`, {record['date']}, {record['machine']}: the peak of a "
        "process that trains, against the plan made before.",
        "",
        "| case | predicted | measured | error |",
        "| --- | ---: | ---: | ---: |",
    ]
    for one in record["results"]:
        cells = (f"{one['predicted'] / 1e6:,.0f} MB", f"{one['measured'] / 1e6:,.0f} MB")
        lines.append(f"| {one['case']} | {cells[0]} | {cells[1]} | {one['error']:+.1%} |")
    lines += ["", f"Largest error: {record['largest_error']:.1%}."]
    return "\n".join(lines)


def _notes(path: Path) -> str:
    if not path.is_file():
        return ""
    _, mark, notes = path.read_text(encoding="utf-8").partition(MARK)
    by_hand = notes.strip("\n") if mark else ""
    return by_hand.split("## How far to trust the memory")[0].rstrip("\n")


def pages() -> dict[Path, str]:
    """Every page: where it lies and what it should say."""
    from loratune.cli import COMMANDS

    texts: dict[Path, str] = {}
    for command in COMMANDS:
        path = FOLDER / f"{command}.md"
        extra: Callable[[], str] = plan_accuracy if command == "plan" else str
        notes = "\n\n".join(filter(None, (_notes(path), extra())))
        texts[path] = command_page(command, notes)
    texts[FOLDER / "settings.md"] = settings_page()
    return texts


def main() -> None:
    """Write the stale pages, or with --check name them and exit 1."""
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)  # no ./recipes of somebody's
        texts = pages()
        os.chdir(ROOT)
    stale = [
        path
        for path, text in texts.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        sys.exit("\n".join(f"stale: {path.relative_to(ROOT)}" for path in stale) or 0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in stale:
        path.write_text(texts[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
