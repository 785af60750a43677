"""(g) A real pretrained model on real rows: what sharing beginnings saves, and against the peers.

The base is the folder that ``LORATUNE_BASE`` names (SmolLM2-135M-Instruct, dequantised from Q4_1,
where the page says so); the rows are Banking77's chat rows and E2E NLG's, from
``LORATUNE_SHARED``.  Every trainer is a process of its own, and they take their steps in turn;
every few steps all of them are asked for their loss on the same rows that nobody trains on.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.dev_loss import ROWS as DEV_ROWS
from benchmarks.e2e import Contender, Task, encode, row_of, shared_folder, take_turns
from benchmarks.e2e_llama_factory import LLAMA_FACTORY

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS = {"banking77": "Banking77", "e2e": "E2E NLG"}
FP32 = [
    Contender("loratune", "loratune", sharing=True),
    Contender("loratune, nothing shared", "loratune"),
    Contender("TRL + PEFT, as shipped", "trl", as_shipped=True, same_order=False),
    Contender("TRL + PEFT, rows in our order", "trl"),
    Contender("TRL + PEFT, packing", "trl", packing=True, same_order=False),
    Contender("Trainer + PEFT", "trainer"),
    Contender("LLaMA-Factory, as shipped", LLAMA_FACTORY, as_shipped=True, same_order=False),
]
BF16 = [
    Contender("loratune", "loratune", "bf16", sharing=True),
    Contender("loratune, nothing shared", "loratune", "bf16"),
    Contender("TRL + PEFT, as shipped", "trl", "bf16 autocast", as_shipped=True, same_order=False),
    Contender("TRL + PEFT, rows in our order", "trl", "bf16 weights"),
    Contender("Trainer + PEFT", "trainer", "bf16 weights"),
    Contender(
        "LLaMA-Factory, as shipped", LLAMA_FACTORY, "bf16", as_shipped=True, same_order=False
    ),
]


def main() -> None:
    found = common.parser(__doc__)
    found.add_argument("--steps", type=int, default=8, help="steps each; two are not in the rates")
    found.add_argument("--batch", type=int, default=16)
    found.add_argument("--groups", default="fp32,bf16")
    found.add_argument("--only", default="", help="only contenders whose name contains this")
    arguments = found.parse_args()
    options = common.options_of(arguments)
    base = os.environ.get("LORATUNE_BASE")
    if base is None or not Path(base).is_dir():
        common.say("no real model: set LORATUNE_BASE to a folder; nothing measured")
        return
    task = Task(batch=arguments.batch, max_length=256, packed_length=1024, rank=16, targets=LINEAR)
    groups: dict[str, Any] = {}
    settings = {
        "base": json.loads((Path(base) / "config.json").read_text())["model_type"],
        "batch": task.batch,
        "steps": arguments.steps - 2,
        "rank": task.rank,
    }
    for data, name in ROWS.items():
        for precision in arguments.groups.split(","):
            contenders = FP32 if precision == "fp32" else BF16
            chosen = [one for one in contenders if arguments.only in one.name]
            common.say(f"{name}, {precision}")
            rows = measure(Path(base), data, task, chosen, arguments.steps, options)
            groups[f"{data}_{precision}"] = rows
            common.write_result("real", options, {"settings": settings, "groups": groups})


def split_rows(source: Path, work: Path) -> None:
    """Rows to train on, and some, spread over the file, that nobody trains on."""
    with source.open(encoding="utf-8") as file:
        lines = file.readlines()
    apart = set(range(0, len(lines), len(lines) // DEV_ROWS)[:DEV_ROWS])
    for name, is_dev in (("dev.jsonl", True), ("rows.jsonl", False)):
        chosen = [line for number, line in enumerate(lines) if (number in apart) == is_dev]
        (work / name).write_text("".join(chosen), encoding="utf-8")


def measure(
    base: Path,
    data: str,
    task: Task,
    contenders: list[Contender],
    steps: int,
    options: common.Options,
) -> list[dict[str, Any]]:
    """Rates of every contender on one set of rows."""
    with tempfile.TemporaryDirectory(prefix="loratune-bench-") as folder:
        work = Path(folder)
        (work / "model").symlink_to(base.resolve(), target_is_directory=True)
        split_rows(shared_folder() / "data" / data / "train.jsonl", work)
        vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
        plan = encode(work, vocabulary, steps, task)
        workers = take_turns(contenders, task, work, work / "runs", plan, options)
        rows = [row_of(worker, 2) for worker in workers]
    for row in rows:
        peak = row["peak_bytes"] / 1e9
        common.say(f"  {row['name']}: {row['rows_per_second']:.2f} rows/s, {peak:.2f} GB")
    return rows


if __name__ == "__main__":
    main()
