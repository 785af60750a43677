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
from loratune.counting.tables import to_markdown

_KEPT = ("loss", "exact_match", "forgetting")


def body(comparison: Comparison) -> str:
    """Facts, findings, quality, costs and differences, below a heading of the page's own."""
    page = tables.markdown(comparison).split("\n\n")
    first_table = next(place for place, part in enumerate(page) if part.startswith("| "))
    head = page[1 : first_table - 1]
    grids = [tables.quality_grid(comparison), tables.cost_grid(comparison)]
    grids.append(tables.difference_grid(comparison, _KEPT))
    return "\n\n".join([*head, *(to_markdown(grid).rstrip() for grid in grids)])


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
