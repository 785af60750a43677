"""Tables of trainers on the same rows: rates, losses, and seconds to a loss."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.dev_loss import common_target, seconds_to
from benchmarks.goals import Results
from benchmarks.markdown import NONE, mib, number, spread, table


def rows_table(benchmark: str, group: str) -> Callable[[Results], str]:
    """Training on rows, one group of contenders."""

    def place(results: Results) -> str:
        rows = results[benchmark]["groups"].get(group)
        if not rows:
            return NONE
        own = rows[0]["rows_per_second"]
        return table(
            [
                "",
                "rows/s",
                "tokens/s",
                "s a step",
                "tokens / computed",
                "peak MiB",
                f"{rows[0]['name']} is",
            ],
            [
                [
                    row["name"],
                    number(row["rows_per_second"]),
                    f"{row['tokens_per_second']:,.0f}",
                    spread(row["step_seconds"]),
                    number(row["fill"]),
                    mib(row["peak_bytes"]),
                    f"{own / row['rows_per_second']:.2f} ×",
                ]
                for row in rows
            ],
        )

    return place


def losses(results: Results) -> str:
    """Loss curves on the same rows from the same start, beside loratune's fp32."""
    groups = results["e2e"]["groups"]
    reference = groups["fp32"][0]["losses"]
    lines = []
    seen = set()
    for row in [*groups["fp32"], *groups.get("bf16", [])]:
        if not row["same_order"] or row["name"] in seen:
            continue
        seen.add(row["name"])
        own = row["losses"]
        apart = max(abs(a - b) for a, b in zip(own, reference, strict=True))
        lines.append([row["name"], f"{own[0]:.4f}", f"{own[-1]:.4f}", f"{apart:.1e}"])
    return table(["same rows, same start", "first loss", "last loss", "largest difference"], lines)


def to_target(group: str) -> Callable[[Results], str]:
    """Steps and seconds until the loss on unseen rows is as low as every trainer gets it."""

    def place(results: Results) -> str:
        rows = results["real"]["groups"].get(group)
        if not rows or not rows[0].get("looks"):
            return NONE
        target = common_target([row["looks"] for row in rows])
        needed = {row["name"]: seconds_to(target, row["looks"]) for row in rows}
        own = needed[rows[0]["name"]]
        assert own is not None
        lines = []
        for row in rows:
            seconds = needed[row["name"]]
            assert seconds is not None
            first, last = row["looks"][0]["loss"], row["looks"][-1]["loss"]
            losses = [f"{first:.3f}", f"{last:.3f}"]
            lines.append([row["name"], *losses, number(seconds), f"{seconds / own:.2f} ×"])
        steps = rows[0]["looks"][-1]["steps"]
        return table(
            ["", "after 1 step", f"after {steps}", f"s to {target:.3f}", "loratune's"], lines
        )

    return place


def real_settings(results: Results) -> str:
    """Batch, rank and steps of the runs on the real model."""
    values = results["real"]["settings"]
    return "{batch} rows a step, rank {rank} on all linear layers, {steps} steps".format(**values)


def rows_source(results: Results) -> str:
    """Which rows were trained on."""
    return str(results["e2e"]["settings"]["rows"])
