"""(i) Memory of every process where all weights of a base train and the processes share them out.

A bf16 base of OPT-125m's shape, one step of 4 rows, one checkpoint: as one process trains it, and
as several do with ``launch.shard=true``.  Memory is ``RssAnon``, as in ``sharded_loading``.

usage: python -m benchmarks.sharded_training [--processes 1,2]
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import common, models
from benchmarks.merge import write_base
from benchmarks.sharded_loading import measure, sizes

FULL = ["adapter=full", "adapter.every_parameter=true"]


def table(runs: list[dict[str, Any]]) -> str:
    """Peaks of the process that took most, in MB of a million bytes."""
    keys = ("own", "peak_reading", "peak_steps", "peak_saving")
    lines = [
        "| processes | process itself | while reading | in a step | while saving |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        most = (max(rank[key] for rank in run["ranks"]) for key in keys)
        lines.append(f"| {run['processes']} | {' | '.join(f'{n / 1e6:,.0f}' for n in most)} |")
    return "\n".join(lines)


def main() -> None:
    found = common.parser(__doc__)
    found.add_argument("--processes", default="1,2")
    arguments = found.parse_args()
    options = common.options_of(arguments)
    micro = replace(models.MICRO, vocabulary=1024)
    with tempfile.TemporaryDirectory(prefix="loratune-bench-") as work:
        folder = Path(work)
        write_base(folder / "base", micro if options.is_micro else models.OPT_125M, "2GB")
        runs = [
            measure(folder / "base", folder, int(processes), True, FULL)
            for processes in arguments.processes.split(",")
        ]
        size = sizes(folder / "base")
    common.say(table(runs))
    common.write_result("sharded_training", options, {"settings": size, "runs": runs})


if __name__ == "__main__":
    main()
