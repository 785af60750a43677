"""(b) Training on real prompt/completion rows against TRL and transformers' Trainer with PEFT.

Every trainer is a process of its own with everything set up; they take their steps in turn, one
step each, so that all see the same machine.  The rows are E2E NLG's from ``LORATUNE_SHARED``, or
rows in its style that this script writes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import common, models
from benchmarks.e2e_llama_factory import INTERPRETER, LLAMA_FACTORY

BATCH, MAX_LENGTH, PACKED_LENGTH = 8, 128, 512


@dataclass(frozen=True)
class Contender:
    """One trainer with one choice of settings.

    Attributes:
        name: as the table shows it.
        kind: loratune, trl, trainer or llama_factory.
        precision: fp32; bf16 (loratune), bf16 autocast or bf16 weights (the others).
        packing: several rows a sequence.
        as_shipped: every other setting is the trainer's own default.
        same_order: the rows of each step are those of loratune's steps.
        sharing: whether loratune may compute once what a batch's rows begin with, as by default.
    """

    name: str
    kind: str
    precision: str = "fp32"
    packing: bool = False
    as_shipped: bool = False
    same_order: bool = True
    sharing: bool = False

    def interpreter(self) -> str:
        """The Python that runs it; empty where a trainer needs another and none is named."""
        return os.environ.get(INTERPRETER, "") if self.kind == LLAMA_FACTORY else sys.executable


@dataclass(frozen=True)
class Task:
    """What every trainer trains.

    Attributes:
        batch: rows a step; ``packed_length``: of a sequence that holds about as many.
        rank: of the adapters, on ``targets`` of the base's blocks.
    """

    batch: int = BATCH
    max_length: int = MAX_LENGTH
    packed_length: int = PACKED_LENGTH
    rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def job(self, contender: Contender) -> dict[str, Any]:
        """The part of a worker's job that both decide; packed, one sequence is a batch."""
        one = contender.packing and contender.kind != "loratune"
        return {
            **asdict(contender),
            "batch": 1 if one else self.batch,
            "rows_per_step": self.batch,
            "max_length": self.packed_length if contender.packing else self.max_length,
            "rank": self.rank,
            "targets": list(self.targets),
        }


FP32 = [
    Contender("loratune, fp32", "loratune"),
    Contender("TRL + PEFT, fp32, as shipped", "trl", as_shipped=True, same_order=False),
    Contender("TRL + PEFT, fp32, best padded", "trl"),
    Contender("TRL + PEFT, fp32, packing", "trl", packing=True, same_order=False),
    Contender("Trainer + PEFT, fp32", "trainer"),
    Contender("loratune, bf16", "loratune", "bf16"),
]
BF16 = [
    Contender("loratune, bf16", "loratune", "bf16"),
    Contender(
        "TRL + PEFT, bf16, as shipped", "trl", "bf16 autocast", as_shipped=True, same_order=False
    ),
    Contender("TRL + PEFT, bf16, best padded", "trl", "bf16 weights"),
    Contender("TRL + PEFT, bf16, packing", "trl", "bf16 weights", packing=True, same_order=False),
    Contender("Trainer + PEFT, bf16", "trainer", "bf16 weights"),
]  # fmt: skip


# -- what all of them get ------------------------------------------------------------------


def shared_folder() -> Path:
    """Where data outside the repository lies, if it does."""
    return Path(os.environ.get("LORATUNE_SHARED", common.REPOSITORY.parent / "shared"))


def write_rows(path: Path) -> str:
    """The training rows, and where they come from."""
    source = shared_folder() / "data" / "e2e" / "train.jsonl"
    if source.is_file():
        shutil.copyfile(source, path)
        return "E2E NLG"
    draw = random.Random(0)
    lines = [json.dumps(_restaurant(draw)) for _ in range(2000)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "rows in E2E's style, written by the script"


def _restaurant(draw: random.Random) -> dict[str, str]:
    name = draw.choice(["Aromi", "Blue Spice", "The Mill", "Fitzbillies", "Cotto", "Zizzi"])
    food = draw.choice(["French", "Italian", "Indian", "English", "Japanese"])
    area = draw.choice(["riverside", "city centre"])
    price = draw.choice(["cheap", "moderate", "high", "less than £ 20", "more than £ 30"])
    rating = draw.choice(["low", "average", "high", "1 out of 5", "5 out of 5"])
    prompt = f"name : {name} | food : {food} | price : {price} | rating : {rating} | area : {area}"
    ending = draw.choice(
        ["", " Its prices are " + price + " .", " Customers rate it " + rating + " ."]
    )
    return {"prompt": prompt, "completion": f" {name} is a {food} place in the {area} .{ending}"}


def write_model(folder: Path, shape: models.Shape) -> None:
    """A random OPT folder with OPT's tokenizer, or the embedded demo's where that is absent."""
    import loratune

    models.frozen_opt(shape).save_pretrained(folder)
    tokenizer = shared_folder() / "data" / "opt-bpe"
    if not tokenizer.is_dir() or shape.vocabulary < models.VOCABULARY:
        tokenizer = Path(loratune.__file__).parent / "assets" / "demo-opt"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)


def encode(work: Path, vocabulary: int, steps: int, task: Task) -> list[dict[str, int]]:
    """Write the rows as ids, in both orders; return rows and tokens of each of loratune's steps."""
    from loratune.config.schema import DataConfig, TrainerConfig
    from loratune.data.batches import BatchPlan
    from loratune.data.prepare import prepare_data
    from loratune.models.load import load_tokenizer

    data = DataConfig(path=str(work / "rows.jsonl"), max_length=task.max_length)
    tokenizer = load_tokenizer(work / "model")
    rows = prepare_data(data, tokenizer, vocabulary, 0).train
    lengths = [len(row) for row in rows]
    plan = BatchPlan.from_config(lengths, data, TrainerConfig(steps=steps, batch_size=task.batch))
    step_rows = [plan.step_rows(step) for step in range(steps)]
    plain = [{"ids": row.input_ids, "labels": row.labels} for row in rows]
    orders = {
        "as_they_are": plain,
        "in_our_order": [plain[number] for step in step_rows for number in step],
    }
    if (work / "dev.jsonl").is_file():
        unseen = replace(data, path=str(work / "dev.jsonl"))
        looked_at = prepare_data(unseen, tokenizer, vocabulary, 0).train
        orders["dev"] = [{"ids": row.input_ids, "labels": row.labels} for row in looked_at]
    (work / "encoded.json").write_text(json.dumps(orders), encoding="utf-8")
    return [
        {
            "rows": len(step),
            "tokens": sum(lengths[number] for number in step),
            "padded": len(step) * max(lengths[number] for number in step),
        }
        for step in step_rows
    ]


# -- taking turns --------------------------------------------------------------------------


class Worker:
    """A running trainer that steps when told to."""

    def __init__(self, contender: Contender, job: dict[str, Any], log: Path) -> None:
        self.contender = contender
        self.steps: list[dict[str, Any]] = []
        self.log = log
        environment = {
            **os.environ,
            "PYTHONPATH": str(common.REPOSITORY),
            "OMP_NUM_THREADS": str(job["threads"]),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                [contender.interpreter(), "-m", "benchmarks.e2e_worker", json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=environment,
                text=True,
            )

    def release(self) -> None:
        """Let the next step happen."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def read(self) -> bool:
        """Wait for the step's report; whether there was one."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            self.steps.append(json.loads(line))
        return bool(line)

    def end(self) -> None:
        """Close the door; the process leaves by itself, or is ended: its steps were all read."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:  # other work keeps the machine busy
            self._process.kill()
            self._process.wait()


def take_turns(
    contenders: Sequence[Contender],
    task: Task,
    work: Path,
    runs: Path,
    plan: list[dict[str, int]],
    options: common.Options,
) -> list[Worker]:
    """All steps of all contenders, round-robin; those that fail are left out and named."""
    runs.mkdir()
    workers = []
    for contender in contenders:  # one after the other: set-up needs memory and both cores
        if not contender.interpreter():
            common.say(f"  {contender.name}: left out, {INTERPRETER} names no interpreter for it")
            continue
        folder = runs / contender.name.replace(" ", "_").replace(",", "").replace("+", "and")
        job = {
            **task.job(contender),
            "model": str(work / "model"),
            "rows": str(work / "rows.jsonl"),
            "encoded": str(work / "encoded.json"),
            "out": str(folder),
            "plan": plan,
            "steps": len(plan),
            "threads": options.threads,
            "clock": options.clock,
            "looks": (work / "dev.jsonl").is_file(),
        }
        worker = Worker(contender, job, runs / f"{folder.name}.log")
        if worker.read():  # its first step
            workers.append(worker)
            common.say(f"  {contender.name}: first loss {worker.steps[0]['loss']:.6f}")
        else:
            worker.end()
            common.say(f"  {contender.name} failed:\n{worker.log.read_text()[-1500:]}")
    for number in range(1, len(plan) if workers else 0):
        first = number % len(workers)
        for worker in workers[first:] + workers[:first]:
            worker.release()
            if not worker.read():
                raise RuntimeError(f"{worker.contender.name}: {worker.log.read_text()[-2000:]}")
    for worker in workers:
        worker.end()
    return workers


def looks(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Where rows that nobody trains on were looked at: steps, their seconds, and the loss.

    Seconds count from the end of the first step, which has the start of the process in it.
    """
    found, passed = [], 0.0
    for number, step in enumerate(steps):
        passed += step["seconds"] if number else 0.0
        if "dev" in step:
            found.append({"steps": number + 1, "seconds": passed, "loss": step["dev"]})
    return found


def row_of(worker: Worker, warmup: int) -> dict[str, Any]:
    """Rates over all steps after the warm-up, and the whole loss curve."""
    measured = worker.steps[warmup:]
    seconds = [step["seconds"] for step in measured]
    total = {key: sum(step[key] for step in measured) for key in ("rows", "tokens", "padded")}
    return {
        **asdict(worker.contender),
        "step_seconds": asdict(common.Spread.of(seconds)),
        "rows_per_second": total["rows"] / sum(seconds),
        "tokens_per_second": total["tokens"] / sum(seconds),
        "fill": total["tokens"] / total["padded"],
        "peak_bytes": worker.steps[-1]["peak_bytes"],
        "losses": [step["loss"] for step in worker.steps],
        "looks": looks(worker.steps),
    }


def main() -> None:
    found = common.parser(__doc__)
    found.add_argument("--steps", type=int, help="steps each, the first two of them unmeasured")
    found.add_argument("--only", default="", help="only contenders whose name contains this")
    arguments = found.parse_args()
    options = common.options_of(arguments)
    micro = options.is_micro
    shape = models.Shape(32, 64, 2, 2, vocabulary=2000) if micro else models.OPT_125M
    steps, warmup = arguments.steps or (3 if micro else 12), 1 if micro else 2
    groups: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="loratune-bench-") as folder:
        work = Path(folder)
        source = write_rows(work / "rows.jsonl")
        write_model(work / "model", shape)
        task = Task()
        plan = encode(work, shape.vocabulary, steps, task)
        settings = {"rows": source, "steps": steps - warmup, "batch": BATCH, "rank": task.rank}
        for group, contenders in {"fp32": FP32, "bf16": BF16}.items():
            common.say(group)
            chosen = [c for c in contenders if arguments.only in c.name]
            workers = take_turns(chosen, task, work, work / group, plan, options)
            groups[group] = [row_of(worker, warmup) for worker in workers]
            for row in groups[group]:
                common.say(f"  {row['name']}: {row['rows_per_second']:.2f} rows/s")
            common.write_result("e2e", options, {"settings": settings, "groups": groups})


if __name__ == "__main__":
    main()
