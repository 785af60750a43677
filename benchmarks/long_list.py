"""(f) A long list of rows: what a start from ``data.cache`` takes, and what it keeps in memory.

Rows are written by this script.  The first start reads and encodes them and fills the cache; the
second opens it.  Both train the demo's base for some steps.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.memory import run_measured

SCRIPT = "from loratune.cli import main; main()"
STEPS = 200
SIZES = {"full": (20_000, 200_000, 2_000_000), "micro": (200, 400)}
WORDS = [
    "river",
    "town",
    "bridge",
    "market",
    "harbour",
    "school",
    "winter",
    "garden",
    "letter",
    "morning",
    "engine",
    "road",
]


def write_rows(path: Path, count: int) -> None:
    """A file of ``count`` prompt/completion rows, no two alike."""
    draw = random.Random(count)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            words = " ".join(draw.choices(WORDS, k=draw.randint(5, 30)))
            row = {"prompt": f"Case {number}: {words}?\n", "completion": f"It is {number % 97}."}
            file.write(json.dumps(row) + "\n")


def start(rows: Path, folder: Path, options: common.Options) -> dict[str, float]:
    """Train some steps: seconds to the first one, seconds of a step, peak of resident memory."""
    out = folder / f"run{time.monotonic_ns()}"
    words = ["train", "recipe=smoke", "stages=[train]", f"trainer.steps={STEPS}", f"out={out}"]
    words += [f"data.path={rows}", f"data.cache={folder / 'cache'}", "data.max_length=160"]
    began = time.time()
    run_measured([sys.executable, "-c", SCRIPT, *words], {"OMP_NUM_THREADS": str(options.threads)})
    with (out / "timings.jsonl").open(encoding="utf-8") as lines:
        steps = [line for line in map(json.loads, lines) if "train/step_seconds" in line]
    seconds = sorted(line["train/step_seconds"] for line in steps)
    return {
        "first_step": steps[0]["time"] - began,
        "step": seconds[len(seconds) // 2],
        "peak": max(line["memory/peak_resident_bytes"] for line in steps),
    }


def measure(count: int, options: common.Options) -> dict[str, Any]:
    """Both starts with ``count`` rows."""
    with tempfile.TemporaryDirectory(prefix="loratune-bench-") as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", count)
        first, second = (start(folder / "rows.jsonl", folder, options) for _ in range(2))
        size = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
        text = (folder / "rows.jsonl").stat().st_size
    return {"rows": count, "first": first, "second": second, "cache": size, "text": text}


def main(sizes: Sequence[int] = ()) -> None:
    options = common.options_of(common.parser(__doc__).parse_args())
    chosen = sizes or SIZES["micro" if options.is_micro else "full"]
    rows = []
    for count in chosen:
        rows.append(measure(count, options))
        common.say(json.dumps(rows[-1]))
    common.write_result("long_list", options, {"rows": rows})


if __name__ == "__main__":
    main()
