"""What rewinding gives back: two contenders of the study trained once, then scaled down again."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loratune.report.rewind_page import rewind_table
from loratune.tables import markdown_text
from loratune.units import percent, significant

NAME = "rewind"
LABELS = ("lora", "full")
ROWS = (
    "Seed 0, at the best rate of the comparison. The dev loss here is that of the comparison's "
    "final rows, in nats per token as the loss on held-out text is. The scale is chosen by the "
    "very rows that the tables show: on others it may give back less."
)


def commands(label: str, recipes: Path, rows: list[str], rate: float, out: Path) -> list[list[str]]:
    """A training at a contender's best rate, and the sweep of its scale, as anyone would type them.

    Args:
        label: the contender, a variant's name.
        recipes: the study's own recipes.
        rows: settings that name base, rows and held-out texts.
        rate: learning rate.
        out: the run's folder.
    """
    loratune = [sys.executable, "-m", "loratune"]
    retention = next(word for word in rows if word.startswith("compare.heldout_path="))
    texts = retention.partition("=")[2]
    train = [
        *loratune, "train", "--config-dir", str(recipes), "recipe=study_banking77",
        f"adapter={label}", f"trainer.lr={rate:g}", "trainer.lr_scale=1", "stages=[train]",
        "resume=auto", f"evaluate.retention=[{texts}]", f"out={out}",
        *(word for word in rows if word.startswith(("model.", "data."))),
    ]  # fmt: skip
    return [train, [*loratune, NAME, f"run={out}"]]


def open_commands(
    recipes: Path, rows: list[str], compared: Path, results: Path
) -> Iterator[list[str]]:
    """What is not trained or not rewound yet, one command after the other.

    Args:
        recipes: the study's own recipes.
        rows: settings that name base, rows and held-out texts.
        compared: folder of the comparison that found the contenders' best rates.
        results: folder for the runs.
    """
    comparison = compared / "comparison.json"
    if not comparison.is_file():
        raise SystemExit(f"no best rates to train at: run {compared.name} first ({comparison})")
    values = json.loads(comparison.read_text(encoding="utf-8"))
    rates = {one["label"]: one["lr"] for one in values["variants"]}
    for label in LABELS:
        out = results / label
        if not (out / "rewound" / "rewind.json").is_file():
            train, rewind = commands(label, recipes, rows, rates[label], out)
            if not (out / "summary.json").is_file():
                yield train
            yield rewind


def section(results: Path) -> str:
    """The sweeps as tables; empty where none is finished."""
    parts = []
    for label in LABELS:
        path = results / label / "rewound" / "rewind.json"
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            table = rewind_table(record["points"], record["scale"]).to_markdown().rstrip()
            parts += [f"### {label}", _given_back(record), markdown_text(record["reason"]), table]
    return "\n\n".join(["## What rewinding gives back", ROWS, *parts]) if parts else ""


def _given_back(record: Mapping[str, Any]) -> str:
    """How much was forgotten at scale 1 and at the chosen one, of how much gain."""
    points = {point["scale"]: point for point in record["points"]}
    base, whole, chosen = points[0.0], points[1.0], points[record["scale"]]
    [name] = base["retention"]
    forgotten = [one["retention"][name]["loss"] - base["retention"][name]["loss"] for one in
                 (whole, chosen)]  # fmt: skip
    gains = [base["dev"]["loss"] - one["dev"]["loss"] for one in (whole, chosen)]
    return (
        f"Scale {record['scale']:g} keeps {percent(gains[1] / gains[0])} of a gain of "
        f"{significant(gains[0])} nats a token; the loss on held-out text has grown by "
        f"{forgotten[1]:+.4f} instead of {forgotten[0]:+.4f}."
    )
