"""Render docs/performance.md from benchmarks/results/*.json and the prose of page.md.

usage: python -m benchmarks.render
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.goals import GOALS, Results, named
from benchmarks.markdown import NONE, mib, number, spread, table
from benchmarks.trainer_tables import losses, real_settings, rows_source, rows_table, to_target

TEMPLATE = Path(__file__).parent / "page.md"
PAGE = common.REPOSITORY / "docs" / "performance.md"
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def read_results(folder: Path = common.RESULTS) -> Results:
    """The page's result files, as far as they exist."""
    return {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in sorted(common.PARTS)
        if (folder / f"{name}.json").is_file()
    }


def render(template: str, results: Results) -> str:
    """The page: every ``{{place}}`` of the template filled from the results."""

    def fill(match: re.Match[str]) -> str:
        try:
            return PLACES[match[1]](results)
        except KeyError as missing:
            if match[1] not in PLACES or missing.args[0] not in common.PARTS:
                raise
            return NONE

    return _PLACE.sub(fill, template)


def write_page() -> Path:
    """Render and write; returns the page's path."""
    PAGE.parent.mkdir(exist_ok=True)
    page = render(TEMPLATE.read_text(encoding="utf-8"), read_results())
    PAGE.write_text(page, encoding="utf-8")
    return PAGE


# -- places --------------------------------------------------------------------------------


def goals(results: Results) -> str:
    """The figures to reach beside what was measured."""
    rows = []
    for goal in GOALS:
        value = goal.measured(results)
        sign = "≤" if goal.at_most else "≥"
        limit = f"{sign} {goal.limit:g}{goal.unit}"
        shown = "not measured" if value is None else f"{number(value)}{goal.unit}"
        verdict = "" if value is None else ("yes" if goal.is_met(value) else "**no**")
        rows.append([goal.name, limit, shown, verdict])
    return table(["", "goal", "measured", "met"], rows)


def clock_note(results: Results) -> str:
    """Says which benchmarks were timed on a machine that others used."""
    timed = {name: record for name, record in results.items() if record.get("tables") != {}}
    shared = [name for name, record in timed.items() if record.get("clock") == "cpu"]
    if not shared:
        return "Seconds are wall time."
    return (
        f"While {', '.join(shared)} ran, other work had the machine too: seconds there are **CPU "
        "seconds of one thread**, which preemption does not stretch, though crowded caches and "
        "memory do.  The other seconds are wall time."
    )


def where(results: Results) -> str:
    """Machine, date and versions of the results."""
    lines = []
    for name, record in results.items():
        own = record["machine"]
        flags = f" ({', '.join(own['cpu_flags'])})" if own["cpu_flags"] else ""
        cpu = f"{own['cpu']}{flags}, {own['threads']} of {own['cores']} cores"
        place = f"{record['device']}; {cpu}" if "device" in record else cpu
        versions = ", ".join(
            f"{package} {version}"
            for package, version in record["versions"].items()
            if package not in ("python", "loratune")
        )
        lines.append([name, record["date"], record["revision"] or "", place, versions])
    head = ["benchmark", "date", "loratune at", "machine", "versions"]
    return table(head, lines) if lines else NONE


def step_table(key: str) -> Callable[[Results], str]:
    """Step times of one of step.json's tables."""

    def place(results: Results) -> str:
        found = results["step"]["tables"].get(key)
        if found is None:
            return NONE
        rows = found["rows"]
        return table(
            ["one step", "seconds", "step / floor", "AdamW, ms"],
            [
                [
                    row["name"],
                    spread(row["seconds"]),
                    spread(row["ratio"]),
                    number(row["optimizer_seconds"] * 1e3) if "optimizer_seconds" in row else "",
                ]
                for row in rows
            ],
        )

    return place


def saved(results: Results) -> str:
    """Saved bytes by candidate, dtype and dropout."""
    rows = results["step"]["saved"]
    cases = list(dict.fromkeys((row["dtype"], row["dropout"]) for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    by_key = {(row["name"], row["dtype"], row["dropout"]): row["bytes"] for row in rows}
    head = ["MiB beyond the floor", *(f"{dtype}, dropout {p:g}" for dtype, p in cases)]
    lines = [
        [name, *(mib(by_key[name, *case]) if (name, *case) in by_key else "" for case in cases)]
        for name in names
    ]
    return table(head, lines)


def scaling(results: Results) -> str:
    """Ratios and saved bytes at every point."""
    points = results["scaling"]["points"]
    names = [row["name"] for row in points[0]["rows"][1:]]
    head = ["", "floor, s", *(f"{name}, ratio" for name in names), *(f"{n}, MiB" for n in names)]
    lines = []
    for point in points:
        floor, *rows = point["rows"]
        lines.append(
            [
                f"{point['varies']} {point[point['varies']]}",
                number(floor["seconds"]["median"]),
                *(number(row["ratio"]["median"]) for row in rows),
                *(mib(row["saved_bytes"]) for row in rows),
            ]
        )
    return table(head, lines)


def growth(results: Results) -> str:
    """Time of a row against the rows that begin as it does."""
    lines = []
    for point in results["growth"]["points"]:
        shared, alone = point["shared"], point["each row alone"]
        a_row = [1e3 * one["seconds"]["median"] / point["rows"] for one in (shared, alone)]
        lines.append(
            [
                f"{point['prefix']}",
                f"{point['rows']}",
                *(f"{milliseconds:,.0f}" for milliseconds in a_row),
                f"{1 / shared['ratio']['median']:.2f}",
                f"{alone['computed'] / shared['computed']:.2f}",
            ]
        )
    head = ["shared tokens", "rows", "ms a row", "each alone", "times faster", "fewer tokens"]
    return table(head, lines)


def compiling(results: Results) -> str:
    """What the compiler takes, and what it saves at each length."""
    lines = []
    for dtype, trial in results["compiling"]["trials"].items():
        compiled = [row for row in trial["rows"] if row["name"] == "compiled"]
        pays = trial["pays_from"]
        lines.append(
            [
                dtype,
                *(number(row["ratio"]["median"]) for row in compiled),
                number(trial["compiling"]),
                "never" if pays is None else f"{pays:,.0f}",
                str(trial["recompiled"]),
                f"{trial['difference']:.1e}",
            ]
        )
    lengths = [row["length"] for row in compiled]
    head = ["compiled / eager", *(f"{length} tokens" for length in lengths)]
    more = ["compiling, s", "pays from, steps", "compiled again", "losses differ by"]
    return table([*head, *more], lines)


def merging(results: Results) -> str:
    """Merge times and memory."""
    return table(
        ["", "s of work", "/ copy", "s with imports", "peak MB"],
        [
            [
                row["name"],
                spread(row["seconds"]),
                spread(row["ratio"]),
                number(row["process_seconds"]["median"]),
                f"{row['peak_bytes'] / 1e6:,.0f}",
            ]
            for row in results["merge"]["rows"]
        ],
    )


def merge_size(results: Results) -> str:
    """What was merged."""
    settings = results["merge"]["settings"]
    largest = settings["largest_shard"] / 1e6
    size = f"{settings['bytes'] / 1e9:.2f} GB in {settings['files']} files"
    return f"{size}, the largest {largest:,.0f} MB"


def starting(results: Results) -> str:
    """Start-up times."""
    rows = results["startup"]["rows"]
    return table(["", "seconds"], [[row["name"], spread(row["seconds"])] for row in rows])


def long_list(results: Results) -> str:
    """Starts with ever more rows."""
    head = ["rows", "first start, s", "its peak, MB", "later start, s", "its peak, MB", "step, ms"]
    rows = [
        [
            f"{row['rows']:,}",
            f"{row['first']['first_step']:.1f}",
            f"{row['first']['peak'] / 1e6:,.0f}",
            f"{row['second']['first_step']:.1f}",
            f"{row['second']['peak'] / 1e6:,.0f}",
            f"{row['second']['step'] * 1e3:.1f}",
        ]
        for row in results["long_list"]["rows"]
    ]
    return table(head, rows)


def cuda(results: Results) -> str:
    """The CUDA tables, or that there are none."""
    if "cuda" not in results:
        return (
            "| one step | ms | step / floor | tokens/s | peak GiB |\n"
            "|---|---:|---:|---:|---:|\n\n"
            "*No CUDA device was at hand: this table is empty until `python -m benchmarks.cuda` "
            "runs on one.*"
        )
    record = results["cuda"]
    tables = "\n\n".join(cuda_table(found) for found in record["tables"].values())
    return f"On one {record['device']}.\n\n{tables}"


def cuda_table(found: Mapping[str, Any]) -> str:
    """One model in one number format."""
    rows = [
        [
            row["name"],
            spread(row["seconds"], 1e3),
            spread(row["ratio"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
        ]
        for row in found["rows"]
    ]
    failed = [f"{item['name']}: {item['reason']}" for item in found["failures"]]
    notes = "".join(f"\n\nNot measured: {line}." for line in failed)
    title = f"{found['model']}, {found['dtype']}, {found['batch']} × {found['length']} tokens:"
    head = ["one step", "ms", "step / floor", "tokens/s", "peak GiB"]
    return f"{title}\n\n{table(head, rows)}{notes}"


def ratio_of(table_key: str, name: str) -> Callable[[Results], str]:
    """A step ratio within a sentence."""

    def place(results: Results) -> str:
        rows = results["step"]["tables"].get(table_key, {"rows": []})["rows"]
        if not rows:
            return NONE
        return number(named(rows, name)["ratio"]["median"])

    return place


def rate_ratio(group: str, own: str, other: str) -> Callable[[Results], str]:
    """A ratio of rates within a sentence."""

    def place(results: Results) -> str:
        rows = results["e2e"]["groups"][group]
        return number(named(rows, own)["rows_per_second"] / named(rows, other)["rows_per_second"])

    return place


PLACES: dict[str, Callable[[Results], str]] = {
    "goals": goals,
    "clock_note": clock_note,
    "where": where,
    "step_short": step_table("short"),
    "step_half": step_table("half"),
    "step_long": step_table("long"),
    "saved": saved,
    "e2e_fp32": rows_table("e2e", "fp32"),
    "e2e_bf16": rows_table("e2e", "bf16"),
    "real_banking77_fp32": rows_table("real", "banking77_fp32"),
    "real_banking77_bf16": rows_table("real", "banking77_bf16"),
    "real_e2e_fp32": rows_table("real", "e2e_fp32"),
    "real_e2e_bf16": rows_table("real", "e2e_bf16"),
    "real_banking77_target": to_target("banking77_fp32"),
    "real_e2e_target": to_target("e2e_fp32"),
    "real_settings": real_settings,
    "losses": losses,
    "scaling": scaling,
    "growth": growth,
    "compiling": compiling,
    "merging": merging,
    "merge_size": merge_size,
    "starting": starting,
    "long_list": long_list,
    "cuda": cuda,
    "rows_source": rows_source,
    "lora_ratio": ratio_of("short", "loratune LoRA"),
    "own_head_ratio": ratio_of("short", "loratune LoRA, own loss head"),
    "peft_ratio": ratio_of("short", "PEFT LoRA"),
    "against_best": rate_ratio("fp32", "loratune, fp32", "TRL + PEFT, fp32, best padded"),
    "against_trainer": rate_ratio("fp32", "loratune, fp32", "Trainer + PEFT, fp32"),
}


if __name__ == "__main__":
    write_page()
    sys.stdout.write(f"wrote {PAGE.name}\n")
