#!/usr/bin/env python3
"""Put measured comparisons into a Markdown page.

    python scripts/fill_comparisons.py docs/choosing-a-variant.md outputs/demo/compare-* ...

Between ``<!-- comparison NAME -->`` and ``<!-- end -->`` stands what the tool itself printed for
the comparison of that name; everything else on the page is left as it is.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from loratune.compare import tables
from loratune.compare.result import Comparison

_SHOWN = ("loss", "exact_match", "forgetting")


def body(comparison: Comparison) -> str:
    """Facts, findings, quality, costs and differences, below a heading of the page's own."""
    parts = tables.markdown_head(comparison)
    shown = (
        tables.quality_table(comparison),
        tables.cost_table(comparison),
        tables.difference_table(comparison, _SHOWN),
    )
    return "\n\n".join([*parts, *(table.to_markdown().rstrip() for table in shown)])


def fill(text: str, comparison: Comparison) -> str:
    """The page with this comparison in its place."""
    start = f"<!-- comparison {comparison.name} -->"
    pattern = re.compile(rf"{re.escape(start)}.*?<!-- end -->", re.S)
    if not pattern.search(text):
        raise SystemExit(f"the page has no place '{start}'")
    return pattern.sub(lambda _: f"{start}\n{body(comparison)}\n<!-- end -->", text)


def main() -> None:
    """Fill the page in place."""
    if len(sys.argv) < 3:
        raise SystemExit((__doc__ or "").strip())
    page = Path(sys.argv[1])
    text = page.read_text(encoding="utf-8")
    for folder in sys.argv[2:]:
        values = json.loads((Path(folder) / "comparison.json").read_text(encoding="utf-8"))
        text = fill(text, Comparison.from_dict(values))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
