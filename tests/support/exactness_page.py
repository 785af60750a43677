"""Write the measured tables into docs/exactness.md: python -m support.exactness_page, in tests/."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "exactness.md"


def printed_by(*words: str) -> str:
    """What a program prints, its Markdown table alone."""
    run = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    kept = [line.rstrip() for line in run.stdout.splitlines() if line.startswith("|")]
    return "\n".join(kept) + "\n"


def published() -> str:
    """The table that ``loratune count-params published=true format=md`` prints."""
    return printed_by("-m", "loratune", "count-params", "published=true", "format=md")


def main() -> None:
    """Replace what lies between each block's marks."""
    blocks = {
        "parity": printed_by("-m", "parity.table"),
        "published": published(),
    }
    text = PAGE.read_text(encoding="utf-8")
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, block=block: f"{match[1]}{block}{match[2]}", text)
        assert found == 1, name
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
