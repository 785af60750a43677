#!/usr/bin/env python3
"""Run the comparisons of the study, or some of them by name, and write docs/study.md.

    python scripts/study.py BASE [NAME ...]
    python scripts/study.py page

BASE is SmolLM2-135M-Instruct (a folder or a hub id); NAME one of recipes/study/recipe.  Rows come
from the folder that LORATUNE_SHARED names.  Every cell is kept below outputs/study: stopped at any
time, the same command goes on where it was.  The page holds nothing that no comparison says;
``page`` writes it again from what is finished.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import study_rewind
from study_claims import TESTS

from loratune import files
from loratune.compare import tables
from loratune.compare.metrics import metric_of
from loratune.compare.result import Comparison, VariantResult
from loratune.report.charts.chart_frame import Chart
from loratune.report.comparison_charts import curve_charts, pareto_charts, search_charts
from loratune.tables import Table
from loratune.units import byte_size, significant

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes" / "study"
RESULTS = ROOT / "outputs" / "study"
PAGE = ROOT / "docs" / "study.md"
FOLDER = ROOT / "docs" / "study"
README = ROOT / "README.md"
MAIN = "variants_banking77"
"""The comparison that README shows, and whose best rates the rewound runs take."""
IDENTITIES = "identities"
"""The comparison of one training's names: there is nothing to choose and nothing to draw."""
HEAD = """# The study

Written by `make study` from the comparisons' own files; no verdict and no ranking is typed by hand.

The base is SmolLM2-135M-Instruct as it was at hand: dequantised from Q4_1, not the release itself.
Rows: Banking77 (PolyAI, CC BY 4.0), the E2E NLG challenge (CC BY-SA 4.0), and for what is forgotten
WikiText-2 (CC BY-SA 3.0). Trainings are short, so that several seeds of every contender fit on two
cores: what holds after sixty steps need not hold after six thousand. Every contender is trained at
its own best rate of a grid that grows while its edge is best, unless its recipe gives the rate; one
training chooses it, with a seed and rows (the dev rows) that judge nothing later.
`full` trains the weights of the same linear layers, not the embedding and the norms.

How to read it:

- **Loss** is the mean over the supervised tokens of the final rows, in nats; **forgetting** is how
  much the loss on WikiText-2 has grown over the base's.
- An interval holds for its own number. A p-value is corrected for all pairs of its table (Holm), so
  a pair's interval may exclude zero while the pair is not significant.
- **Margin**: 1 % of what the best contender gained over the base. A difference that is shown to be
  smaller is called equivalent; *undecided* means too few rows and seeds to tell.
- **Steps to dev loss**: where a seed's curve of dev losses first crosses it, on a straight line
  between two measurements; the recipe's target, or the highest last dev loss, which all reach.
- **Seconds** are medians of one core, whatever else had the machine: each comparison says how far
  two seeds of one contender lie apart in them."""
_ROWS = {"e2e": "e2e", "": "banking77"}
"""Ending of a recipe's name, and the data set that it trains on."""
HELDOUT_TEXTS = 24
"""Scored at every point of every curve, where forgetting is wanted at a target loss."""


def claims(name: str) -> dict[str, str]:
    """The claims that a recipe's comparison is to confirm or refute, from the comments at its head.

    Returns:
        Name of a test (``study_claims.TESTS``) to the claim in words.
    """
    text = (RECIPES / "recipe" / f"{name}.yaml").read_text(encoding="utf-8")
    found = dict(re.findall(r"^# claim (\w+): (.+)$", text, re.MULTILINE))
    for other, left_out in re.findall(r"^# claims of (\w+)(?: but (\w+))?:", text, re.MULTILINE):
        found |= {test: claim for test, claim in claims(other).items() if test != left_out}
    return found


def names() -> list[str]:
    """Every recipe that has a claim, in the page's order."""
    found = [path.stem for path in (RECIPES / "recipe").glob("*.yaml") if claims(path.stem)]
    return sorted(found, key=lambda name: (name != MAIN, name == IDENTITIES, name))


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


def inputs(name: str, base: str, shared: Path, results: Path = RESULTS) -> list[str]:
    """The settings that name a recipe's base, rows and held-out texts."""
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
        f"model.path={base}", f"data.path={train}", f"data.eval_path={test}",
        f"compare.heldout_path={heldout}",
    ]  # fmt: skip


def command(name: str, base: str, shared: Path, results: Path = RESULTS) -> list[str]:
    """The comparison of one recipe, as anyone would type it."""
    return [
        sys.executable, "-m", "loratune", "compare", "--config-dir", str(RECIPES), f"recipe={name}",
        *inputs(name, base, shared, results), f"processes={min(4, len(os.sched_getaffinity(0)))}",
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


def verdict_table(name: str, comparison: Comparison) -> Table:
    """What the comparison says of each claim."""
    rows = []
    for test, claim in claims(name).items():
        found = TESTS[test](comparison)
        rows.append((claim, found.word, found.evidence))
    columns = ("claim", "verdict", "evidence")
    return Table("verdicts", columns, tuple(rows), numeric=(False,) * len(columns))


def figures(name: str, comparison: Comparison, folder: Path) -> str:
    """The comparison's drawings as files beside the page, and the lines that show them."""
    folder.mkdir(parents=True, exist_ok=True)
    charts = (*pareto_charts(comparison), *search_charts(comparison), *curve_charts(comparison))
    lines = []
    for chart in charts:
        path = folder / f"{name}-{re.sub('[^a-z0-9]+', '-', chart.title.lower()).strip('-')}.svg"
        path.write_text(standalone(chart), encoding="utf-8")
        lines.append(f"![{chart.title}]({folder.name}/{path.name})")
    return "\n".join(lines)


def standalone(chart: Chart) -> str:
    """A drawing that needs no page around it: with its own colours, light and dark."""
    style = resources.files("loratune.report").joinpath("templates/style.css").read_text("utf-8")
    opening = '<svg xmlns="http://www.w3.org/2000/svg" class="figure" '
    drawing = str(chart.drawing).replace("<svg ", opening, 1)
    head, _, rest = drawing.partition(">")
    ground = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    return f"{head}><style>{style}</style>{ground}{rest}\n"


AIMS = {
    "the lowest loss": ("loss", significant),
    "the least forgetting": ("forgetting", "{:+.4f}".format),
    "the least memory": ("peak_bytes", byte_size),
}
"""What one may want, the estimate that tells it, lowest first, and how it is written.

Not seconds: they depend on what else the machine did.
"""


def aims_table(comparison: Comparison) -> Table:
    """Who comes first in each of several aims, and what its loss and forgetting are there."""
    rows = []
    for aim, (key, written) in AIMS.items():
        able = [one for one in comparison.variants if key in one.estimates]
        if not able:
            continue
        first, *others = sorted(able, key=lambda one: one.estimates[key].mean)
        value = written(first.estimates[key].mean)
        second = f"{others[0].label} {written(others[0].estimates[key].mean)}" if others else ""
        rows.append((aim, first.label, value, second, *_reached(first)))
    columns = ("for", "first", "it has", "next", "its loss", "its forgetting")
    caption = "Means over seeds; whether first and next differ is told below."
    return Table("by aim", columns, tuple(rows), numeric=(False,) * 6, caption=caption)


def _reached(variant: VariantResult) -> tuple[str, ...]:
    return tuple(
        metric_of(key).with_interval(variant.estimates[key]) if key in variant.estimates else "–"
        for key in ("loss", "forgetting")
    )


def noise_in_seconds(comparison: Comparison) -> list[str]:
    """How far seconds of one and the same work lie apart; nothing where each has one seed."""
    ratios = []
    for one in comparison.variants:
        seconds = [run.step_seconds for run in one.members if run.step_seconds]
        if len(seconds) > 1:
            ratios.append((max(seconds) / min(seconds), one.label))
    if not ratios:
        return []
    ratio, label = max(ratios)
    return [
        f"Seconds a step of two seeds of one contender differ by up to {ratio:.2f} times "
        f"({label}): smaller differences between contenders tell nothing."
    ]


def section(name: str, comparison: Comparison, folder: Path) -> str:
    """One comparison: the verdict on each claim, then what was found, drawn and in numbers."""
    facts, findings = tables.markdown_head(comparison)[:-1], tables.markdown_head(comparison)[-1:]
    parts = [f"## {name.replace('_', ' ')}", _markdown(verdict_table(name, comparison)), *facts]
    if name != IDENTITIES:
        other, seeds = ordered_otherwise(comparison)
        parts += [
            _markdown(aims_table(comparison)),
            *findings,
            f"{other} of {seeds} seeds alone order the contenders otherwise than their means do.",
            *noise_in_seconds(comparison),
        ]
    shown = [tables.contender_table(comparison), tables.quality_table(comparison)]
    if name != IDENTITIES:
        shown += [tables.cost_table(comparison), tables.search_table(comparison)]
    parts += [_markdown(table) for table in shown if table.rows]
    parts += [figures(name, comparison, folder)] if name != IDENTITIES else []
    parts.append(f"All pairs, all seeds, every curve: [{name}.json]({folder.name}/{name}.json).")
    return "\n\n".join(parts)


def _markdown(table: Table) -> str:
    return table.to_markdown().rstrip()


def page(results: Path, folder: Path) -> str:
    """All comparisons that are finished, and which are not.

    Args:
        results: where they lie.
        folder: for the drawings and the raw numbers that the page shows.
    """
    finished, missing, seconds = [], [], 0.0
    for name in names():
        path = results / name / "comparison.json"
        if path.is_file():
            values = published(json.loads(path.read_text(encoding="utf-8")))
            comparison = Comparison.from_dict(values)
            finished.append(section(name, comparison, folder))
            seconds += comparison.seconds
            files.write_json(folder / f"{name}.json", values)
        else:
            missing.append(name)
    rewound = study_rewind.section(results / study_rewind.NAME)
    missing += [] if rewound else [study_rewind.NAME]
    head = [HEAD, f"All comparisons together took {seconds:,.0f} s of one core's work."]
    if missing:
        head.append(f"Not run: {', '.join(missing)}.")
    return "\n\n".join([*head, *finished, *filter(None, [rewound])]) + "\n"


def published(values: dict[str, Any]) -> dict[str, Any]:
    """A comparison's file without the data sets' own rows, and without this machine's folders."""
    places = [
        *values["rows"]["sources"].values(),
        values["base"]["path"],
        values["recipe"].get("out"),
    ]
    paths = {path: Path(path).name for path in filter(None, places)}
    provenance = {**values["provenance"], "command": []}
    text = json.dumps({**values, "samples": [], "provenance": provenance})
    for path, name in sorted(paths.items(), key=lambda item: -len(item[0])):
        text = text.replace(json.dumps(path)[1:-1], name)
    found: dict[str, Any] = json.loads(text)
    return found


def write_page() -> None:
    """docs/study.md of what is finished, and README's part of it."""
    PAGE.write_text(page(RESULTS, FOLDER), encoding="utf-8")
    path = RESULTS / MAIN / "comparison.json"
    if path.is_file():
        comparison = Comparison.from_dict(json.loads(path.read_text(encoding="utf-8")))
        text = README.read_text(encoding="utf-8")
        README.write_text(with_main_table(text, comparison), encoding="utf-8")


def with_main_table(readme: str, comparison: Comparison) -> str:
    """README with the main comparison's table and figure between its two marks."""
    quality, costs = tables.quality_table(comparison), tables.cost_table(comparison)
    shown = [n for n, column in enumerate(quality.columns) if not column.startswith("token acc")]
    spent = [costs.columns.index(column) for column in ("trainable", "seconds a step")]
    empty = (None,) * len(spent)
    rows = [
        tuple(row[n] for n in shown) + (tuple(costs.rows[k][n] for n in spent) if k < len(
            costs.rows) else empty)
        for k, row in enumerate(quality.rows)
    ]  # fmt: skip
    columns = [quality.columns[n] for n in shown] + [costs.columns[n] for n in spent]
    table = replace(quality, columns=tuple(columns), rows=tuple(rows), formats=costs.formats)
    figure = f"{MAIN}-quality-against-trainable-bytes.svg"
    seconds = f"{comparison.seconds:,.0f} s of one core's work"
    block = "\n\n".join(
        [
            _markdown(table),
            f"![Quality against trainable bytes](docs/{FOLDER.name}/{figure})",
            "\n".join(
                f"- {claim} *{word}*" for claim, word, _ in verdict_table(MAIN, comparison).rows
            ),
            f"Measured {comparison.created[:10]}, {seconds}; the evidence for each word is in "
            f"[docs/{PAGE.name}](docs/{PAGE.name}).",
        ]
    )
    begin, end = "<!-- study:begin -->\n", "<!-- study:end -->"
    head, _, rest = readme.partition(begin)
    return f"{head}{begin}{block}\n{end}{rest.partition(end)[2]}"


def perform(words: Sequence[str]) -> None:
    """Run one command; where it fails it has said why, and this ends with its exit code."""
    if code := subprocess.run(words, check=False).returncode:
        raise SystemExit(code)


def require_rows(shared: Path) -> None:
    """Check that the data sets are there before anything is trained."""
    for folder in (*_ROWS.values(), "wikitext2"):
        if not (path := shared / "data" / folder).is_dir():
            raise SystemExit(f"no rows in {path}; name their folder as LORATUNE_SHARED=DIR")


def main(arguments: Sequence[str]) -> None:
    """Run what is named, or everything; write the page after each comparison."""
    if arguments and arguments[0] == "page":
        return write_page()
    parts = [*names(), study_rewind.NAME]
    usage = f"{(__doc__ or '').strip()}\n\nNAME: {', '.join(parts)}"
    if {"-h", "--help"} & set(arguments):
        return print(usage)
    if not arguments or set(arguments[1:]) - set(parts):
        raise SystemExit(usage)
    base, shared = arguments[0], Path(os.environ.get("LORATUNE_SHARED", ROOT.parent / "shared"))
    require_rows(shared)
    for name in arguments[1:] or parts:
        if name == study_rewind.NAME:
            for words in study_rewind.open_commands(
                RECIPES, inputs(MAIN, base, shared), RESULTS / MAIN, RESULTS / name
            ):
                perform(words)
        else:
            perform(command(name, base, shared))
        write_page()


if __name__ == "__main__":
    main(sys.argv[1:])
