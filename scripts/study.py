#!/usr/bin/env python3
"""Run the comparisons of the study, or some of them by name, and write docs/study.md.

    python scripts/study.py BASE [NAME ...]

BASE is SmolLM2-135M-Instruct (a folder or a hub id); NAME one of recipes/study/recipe.  Rows come
from the folder that LORATUNE_SHARED names.  Every cell is kept below outputs/study: stopped at any
time, the same command goes on where it was.  The page holds nothing that no comparison says.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from loratune.compare import tables
from loratune.compare.result import Comparison
from loratune.tables import markdown_text

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes" / "study"
RESULTS = ROOT / "outputs" / "study"
PAGE = ROOT / "docs" / "study.md"
_ROWS = {"e2e": "e2e", "": "banking77"}
"""Ending of a recipe's name, and the data set that it trains on."""
HELDOUT_TEXTS = 24
"""Scored at every point of every curve, where forgetting is wanted at a target loss."""


def claims(name: str) -> list[str]:
    """What a recipe's comparison is to confirm or refute, from the comments at its head."""
    text = (RECIPES / "recipe" / f"{name}.yaml").read_text(encoding="utf-8")
    return [line.removeprefix("# claim: ") for line in text.splitlines() if "# claim: " in line]


def names() -> list[str]:
    """Every recipe that has a claim."""
    paths = sorted((RECIPES / "recipe").glob("*.yaml"))
    return [path.stem for path in paths if claims(path.stem)]


def shuffled(source: Path, target: Path, limit: int | None = None) -> Path:
    """A copy of a file's rows in an order that says nothing: Banking77's are sorted by intent.

    The recipes' limits, or ``limit``, then take a sample, the same one always.
    """
    if not target.is_file():
        rows = source.read_text(encoding="utf-8").splitlines(keepends=True)
        random.Random(0).shuffle(rows)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(rows[:limit]), encoding="utf-8")
    return target


def command(name: str, base: str, shared: Path, results: Path = RESULTS) -> list[str]:
    """The comparison of one recipe, as anyone would type it."""
    folder = next(folder for end, folder in _ROWS.items() if name.endswith(end))
    train, test = (
        shuffled(
            shared / "data" / folder / f"{part}.jsonl", results / "rows" / folder / f"{part}.jsonl"
        )
        for part in ("train", "test")
    )
    heldout = shuffled(
        shared / "data" / "wikitext2" / "heldout.jsonl",
        results / "rows" / "wikitext2" / "heldout.jsonl",
        HELDOUT_TEXTS,
    )
    return [
        sys.executable, "-m", "loratune", "compare", "--config-dir", str(RECIPES), f"recipe={name}",
        f"model.path={base}", f"data.path={train}", f"data.eval_path={test}",
        f"compare.heldout_path={heldout}", f"processes={min(4, len(os.sched_getaffinity(0)))}",
        f"out={results / name}",
    ]  # fmt: skip


def ordered_otherwise(comparison: Comparison) -> tuple[int, int]:
    """How many seeds order the contenders' losses otherwise than the means do, of how many."""
    finished = [v for v in comparison.variants if "loss" in v.estimates]
    means = sorted(finished, key=lambda v: v.estimates["loss"].mean)
    orders = []
    for seed in comparison.seeds:
        losses = {v.label: run.loss for v in finished for run in v.members if run.seed == seed}
        if len(losses) == len(finished) and None not in losses.values():
            orders.append(sorted(losses, key=lambda label: losses[label] or 0.0))
    return sum(order != [v.label for v in means] for order in orders), len(orders)


def section(name: str, comparison: Comparison) -> str:
    """One comparison: the claims, then what was found."""
    other, seeds = ordered_otherwise(comparison)
    parts = [
        f"## {name.replace('_', ' ')}",
        "\n".join(f"> {markdown_text(claim)}" for claim in claims(name)),
        *tables.markdown_head(comparison),
        f"{other} of {seeds} seeds alone order the contenders otherwise than their means do.",
        *(
            table.to_markdown().rstrip()
            for table in (
                tables.contender_table(comparison),
                tables.quality_table(comparison),
                tables.cost_table(comparison),
                tables.difference_table(comparison),
                tables.search_table(comparison),
            )
            if table.rows
        ),
        f"Raw numbers: `outputs/study/{name}/comparison.json`.",
    ]
    return "\n\n".join(parts)


def page(results: Path) -> str:
    """All comparisons that are finished, and which are not."""
    finished, missing = [], []
    for name in names():
        path = results / name / "comparison.json"
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            finished.append(section(name, Comparison.from_dict(values)))
        else:
            missing.append(name)
    head = [
        "# The study",
        "Written by `make study` from the comparisons' own files. The base is "
        "SmolLM2-135M-Instruct, dequantised from Q4_1 where it was made from that file: it is not "
        "the release itself.",
    ]
    if missing:
        head.append(f"Not run: {', '.join(missing)}.")
    return "\n\n".join([*head, *finished]) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Run what is named, or everything; write the page after each comparison."""
    if not arguments or set(arguments[1:]) - set(names()):
        raise SystemExit(f"{(__doc__ or '').strip()}\n\nNAME: {', '.join(names())}")
    shared = Path(os.environ.get("LORATUNE_SHARED", ROOT.parent / "shared"))
    for name in arguments[1:] or names():
        subprocess.run(command(name, arguments[0], shared), check=True)
        PAGE.write_text(page(RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
