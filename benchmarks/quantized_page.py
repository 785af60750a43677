"""Render docs/quantized-base.md from benchmarks/results/quantized_*.json and quantized_page.md.

usage: python -m benchmarks.quantized_page
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.quantized_base import KINDS, PARTS, ROWS
from loratune.units import byte_size

TEMPLATE = Path(__file__).parent / "quantized_page.md"
PAGE = common.REPOSITORY / "docs" / "quantized-base.md"
NONE = "*Not measured yet.*"
Results = dict[str, dict[str, Any]]


def read_results(folder: Path = common.RESULTS) -> Results:
    """The result files of the parts that have been measured."""
    files = {part: folder / f"quantized_{part}.json" for part in PARTS}
    return {part: json.loads(file.read_text()) for part, file in files.items() if file.is_file()}


def render(template: str, results: Results) -> str:
    """The page: every ``{{place}}`` of the template filled."""

    def fill(match: re.Match[str]) -> str:
        part, draw = PLACES[match[1]]
        if part not in results:
            return NONE
        text = draw(results[part])
        small = results[part]["size"] == "micro"
        return f"*From a trial of the script, not a measurement:*\n\n{text}" if small else text

    return re.sub(r"\{\{(\w+)\}\}", fill, template)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured_on(record: dict[str, Any]) -> str:
    where = record["machine"]
    return (
        f"{record['date']}, {where['cpu']}, {where['threads']} of {where['cores']} cores, "
        f"load {where['load']:g}, bitsandbytes {record['versions'].get('bitsandbytes', '?')}."
    )


def products(record: dict[str, Any]) -> str:
    rows = []
    for one in record["products"]:
        seconds = {row["name"]: row["seconds"]["median"] for row in one["rows"]}
        shape = " × ".join(map(str, one["shape"]))
        rows.append([f"{one['kind']}, {shape}", *(f"{1000 * s:.1f} ms" for s in seconds.values())])
    names = [row["name"] for row in record["products"][0]["rows"]]
    settings = record["settings"]
    intro = f"A LoRA layer of rank {settings['rank']}, forward and backward on {settings['tokens']}"
    return f"{intro} tokens in fp32.\n\n{table(['weight', *names], rows)}\n\n{measured_on(record)}"


def loading(record: dict[str, Any]) -> str:
    rows = []
    for one in record["loading"]:
        limit = one["base"] + 2 * one["largest"]
        sizes = (one["base"], one["peak"], one["largest"], limit)
        rows.append([one["kind"], *map(byte_size, sizes)])
    columns = (
        "format", "base in memory", "peak while loading", "largest stored tensor",
        "base + two of them",
    )  # fmt: skip
    return f"{table(columns, rows)}\n\n{measured_on(record)}"


def training(record: dict[str, Any]) -> str:
    parts = []
    settings = record["settings"]
    for data, name in ROWS.items():
        runs = [one for one in record["training"] if one["data"] == data]
        rows = [training_row(kind, [one for one in runs if one["kind"] == kind]) for kind in KINDS]
        columns = (
            f"{name}", "peak memory", "seconds a step", "loss before", "loss after", "exact match",
        )  # fmt: skip
        parts.append(f"{settings['steps'][data]} steps:\n\n{table(columns, rows)}")
    seeds = len({one["seed"] for one in record["training"]})
    intro = (
        f"{settings['batch']} rows a step, LoRA of rank {settings['rank']} "
        f"on all linear layers, learning rate {settings['lr']}, fp32 arithmetic, {seeds} seeds "
        f"(mean ± standard deviation); loss and exact match on {settings['answers']} rows that "
        "nothing was trained on."
    )
    return "\n\n".join([intro, *parts, measured_on(record)])


def training_row(kind: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    loss = [one["adapted"]["loss"] for one in runs]
    exact = [100 * (one["adapted"]["exact_match"] or 0.0) for one in runs]
    return [
        kind,
        byte_size(max(int(one["peak_bytes"]) for one in runs)),
        f"{statistics.median(one['step_seconds'] for one in runs):.2f}",
        f"{runs[0]['base']['loss']:.4f}",
        spread(loss, 4),
        f"{spread(exact, 1)} %",
    ]


def spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def merges(record: dict[str, Any]) -> str:
    runs = [one for one in record["training"] if "merges" in one]
    return "\n\n".join(f"{ROWS[one['data']]}:\n\n{comparison_table(one['merges'])}" for one in runs)


def comparison_table(merged: Sequence[dict[str, Any]]) -> str:
    rows: dict[str, list[str]] = {}
    for one in merged:
        for c in one["comparisons"]:
            name, kind = c["model"], c["model"].removeprefix("the same ")
            name = name if kind == name else f"{one['base']} weights, {kind}"
            figures = (f"{c['loss']:.4f}", f"{c['kl']:.1e}", f"{c['top1']:.1%}")
            rows[name] = [*figures, f"{c['max_difference']:.1e}"]
    columns = ("model", "loss", "KL", "same first choice", "largest difference of a logit")
    return table(columns, [[name, *cells] for name, cells in rows.items()])


def answers(record: dict[str, Any]) -> str:
    rows = []
    for run in record["training"]:
        for one in run.get("answers", []):
            cells = [cell(one[key]) for key in ("prompt", "base", "adapted", "reference")]
            rows.append([ROWS[run["data"]], *cells])
    return table(("rows", "prompt", "base in nf4", "adapted", "reference"), rows)


def cell(text: str) -> str:
    shown = " ".join(text.split()).replace("|", "\\|")
    return shown if len(shown) <= 160 else shown[:159] + "…"


def large(record: dict[str, Any]) -> str:
    one = record["large"]
    bytes_of = "the same bytes as" if one["same_bytes"] else "other bytes than"
    return (
        f"Ten steps took {one['figures']['step_seconds']:.1f} seconds each and at most "
        f"{byte_size(one['peak_bytes'])} of resident memory, the process and the loading included "
        f"({byte_size(one['peak_bytes_resumed'])} when resumed). Killed after its fourth step and "
        f"resumed, the run wrote {bytes_of} the one that was not.\n\n"
        f"{comparison_table(one['merges'])}\n\n{measured_on(record)}"
    )


PLACES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "products": ("products", products),
    "loading": ("loading", loading),
    "training": ("training", training),
    "merges": ("training", merges),
    "answers": ("training", answers),
    "large": ("large", large),
}


def main() -> None:
    PAGE.write_text(render(TEMPLATE.read_text(encoding="utf-8"), read_results()), encoding="utf-8")
    common.say(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
