"""(c) How the variants scale with rank, sequence length, batch and layers.

OPT-125m's width with a small vocabulary, so that the head hides nothing; each point varies one
size of the middle one (rank 16, 4 rows of 128 tokens, 4 layers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks import common, models
from benchmarks.memory import saved_bytes
from benchmarks.step import FLOOR
from loratune.adapters.registry import variant_names
from loratune.config.recipes.variant_settings import variant_settings


@dataclass(frozen=True)
class Point:
    """One place where all variants are measured."""

    rank: int = 16
    length: int = 128
    batch: int = 4
    layers: int = 4


MIDDLE = Point()
VALUES: dict[str, list[int]] = {
    "rank": [4, 16, 64, 256],
    "length": [32, 128, 512],
    "batch": [1, 4, 16],
    "layers": [2, 4, 12],
}
MICRO_VALUES: dict[str, list[int]] = {"rank": [2, 4], "length": [8], "batch": [2], "layers": [1]}
SHAPE = replace(models.OPT_125M, vocabulary=1024)


def points(values: dict[str, list[int]], middle: Point) -> list[tuple[str, Point]]:
    """Every point with the size it varies."""
    return [
        (size, replace(middle, **{size: value}))
        for size, numbers in values.items()
        for value in numbers
    ]


def measure(
    point: Point, shape: models.Shape, rounds: int, now: Callable[[], float]
) -> list[dict[str, Any]]:
    """Times and saved bytes of every variant that has a rank, at one point."""
    shape = replace(shape, layers=point.layers)
    base = models.frozen_opt(shape)
    ids = models.token_ids(shape, point.batch, point.length)
    own = [variant_settings(variant) for variant in variant_names()]
    built = {
        models.title(settings.variant): models.ours(base, settings.with_rank(point.rank))
        for settings in own
        if "rank" not in settings.without_effect
    }
    steps: dict[str, Callable[[], object]] = {FLOOR: models.floor_step(base, ids)}
    steps |= {name: models.adapter_step(model, ids) for name, model in built.items()}
    rows = common.timing_rows(common.interleaved(steps, rounds, now=now), FLOOR)
    least = saved_bytes(base, ids)
    for row in rows:
        model = built.get(row["name"])
        row["saved_bytes"] = saved_bytes(model, ids) - least if model is not None else 0
    return rows


def main() -> None:
    options = common.parse(__doc__)
    torch.set_num_threads(options.threads)
    micro = options.is_micro
    shape = models.MICRO if micro else SHAPE
    middle = Point(rank=4, length=8, batch=2, layers=1) if micro else MIDDLE
    table = []
    for size, point in points(MICRO_VALUES if micro else VALUES, middle):
        rows = measure(point, shape, rounds=1 if micro else 5, now=options.now)
        table.append({"varies": size, **asdict(point), "rows": rows})
        ratios = ", ".join(f"{row['name']} {row['ratio']['median']:.2f}" for row in rows[1:])
        common.say(f"{size} {getattr(point, size)}: {ratios}")
    common.write_result("scaling", options, {"middle": asdict(middle), "points": table})


if __name__ == "__main__":
    main()
