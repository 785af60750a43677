"""(i) Memory and bytes read of every process of a run whose base is sharded (launch.shard=true).

A bf16 base, on a disk whose cache was emptied of it, is loaded by 1, 2 and 4 processes, which then
train a few steps of LoRA.  Memory is ``RssAnon``: what a process wrote itself.  Pages of the
mapped file count as resident too, and the system takes them back whenever it needs them.

usage: python -m benchmarks.sharded_loading [--base FOLDER] [--processes 1,2,4]
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import common, models
from benchmarks.merge import write_base

OPT_1_3B = models.Shape(hidden=2048, inner=8192, layers=24, heads=32)
STEPS = 1
SECONDS_BETWEEN_SAMPLES = 0.01
RECIPE = [
    "recipe=demo", f"trainer.steps={STEPS}", "trainer.batch_size=4", "trainer.threads=1",
    "trainer.eval_every=0", "trainer.save_every=0", "stages=[train]", "data.eval_path=null",
    "data.test_path=null", "data.limit=16", "model.dtype=bfloat16", "model.device=cpu",
    "trainer.precision=auto",
]  # fmt: skip
LORA = ["targets=attention_qv"]


# -- one process of the run ----------------------------------------------------------------


def status(pid: int | str, key: str) -> int:
    """A size in ``/proc/PID/status``, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def disk_reads() -> int:
    """Bytes that this process has caused to be read from a disk, mapped files included."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def worker(marks_file: Path, trains: bool, words: list[str]) -> None:
    """Load, and train, and note when the base was read, and how much of it."""
    import loratune.pipeline.loading as loading
    import loratune.pipeline.run as run
    import loratune.stages.load as stage
    from loratune.cli import main as command
    from loratune.models.reading import Reader
    from loratune.models.weights import tensor_entries
    from loratune.training.checkpoints import Checkpoints

    marks: dict[str, Any] = {"sliced": 0, "hashed": 0}

    def mark(name: str) -> None:
        marks[name] = {"time": time.monotonic(), "disk": disk_reads()}

    def load(*arguments: Any, **named: Any) -> Any:
        mark("begin")
        marks["own"] = status("self", "RssAnon")
        return original["load"](*arguments, **named)

    def wrap_base(*arguments: Any) -> Any:
        wrapped = original["wrap_base"](*arguments)
        mark("read")
        if not trains:
            raise SystemExit(0)
        return wrapped

    def save(self: Checkpoints) -> None:
        mark("saving")
        original["save"](self)

    def value(self: Reader, name: str, *rows: slice) -> Any:
        tensor = original["value"](self, name, *rows)
        entry = self.entries[self.names.stored_as(name)[1].stored[0]]
        marks["sliced"] += tensor.numel() * entry.size // max(1, _count(entry.shape))
        return tensor

    def checked_hashes(folder: Path, *part: int) -> Any:
        hashes = original["checked_hashes"](folder, *part)
        entries = tensor_entries(folder)
        marks["hashed"] += sum(entries[name].size for name in hashes)
        return hashes

    original: dict[str, Any] = {
        "load": loading.load,
        "wrap_base": run.wrap_base,
        "value": Reader.value,
        "checked_hashes": stage.checked_hashes,
        "save": Checkpoints.save,
    }
    loading.load, run.wrap_base, Checkpoints.save = load, wrap_base, save  # type: ignore[method-assign]
    Reader.value, stage.checked_hashes = value, checked_hashes  # type: ignore[method-assign]
    sys.argv = ["loratune", "train", *words]
    try:
        command()
    finally:
        mark("end")
        marks_file.write_text(json.dumps(marks), encoding="utf-8")


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


# -- all of them ---------------------------------------------------------------------------


def forget(base: Path) -> None:
    """Empty the system's cache of a folder's files."""
    for path in base.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(
    base: Path, folder: Path, processes: int, trains: bool, what: list[str]
) -> dict[str, Any]:
    """Start the processes of one run, watch their memory, and gather what they noted."""
    forget(base)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = folder / f"run{processes}"
    words = [*RECIPE, *what, f"model.path={base}", f"out={run}"]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started, marks_files = [], []
    for rank in range(processes):
        marks_files.append(folder / f"marks-{processes}-{rank}.json")
        environment = dict(os.environ)
        if processes > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            environment |= shared | {key: str(value) for key, value in numbers.items()}
            environment |= {"TORCHELASTIC_RUN_ID": "benchmark"}
        command = [sys.executable, "-m", "benchmarks.sharded_loading", "--worker"]
        command += [
            str(marks_files[-1]),
            str(int(trains)),
            *words,
            *(["launch.shard=true"] if processes > 1 else []),
        ]
        with (folder / f"log-{processes}-{rank}.txt").open("w", encoding="utf-8") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    samples = watch(started)
    shutil.rmtree(run, ignore_errors=True)
    if any(one.returncode for one in started):
        raise SystemExit((folder / f"log-{processes}-0.txt").read_text(encoding="utf-8")[-2000:])
    ranks = [
        rank_result(json.loads(path.read_text(encoding="utf-8")), series)
        for path, series in zip(marks_files, samples, strict=True)
    ]
    return {"processes": processes, "ranks": ranks}


def watch(started: list[subprocess.Popen[bytes]]) -> list[list[tuple[float, int]]]:
    """Time and ``RssAnon`` of every process until all have ended."""
    samples: list[list[tuple[float, int]]] = [[] for _ in started]
    while any(one.poll() is None for one in started):
        for one, series in zip(started, samples, strict=True):
            try:
                series.append((time.monotonic(), status(one.pid, "RssAnon")))
            except (OSError, KeyError):  # it has ended
                continue
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    return samples


def rank_result(marks: dict[str, Any], series: list[tuple[float, int]]) -> dict[str, Any]:
    """What one process took."""
    begin, read, end = (marks[name] for name in ("begin", "read", "end"))
    saving = marks.get("saving", end)

    def peak(start: dict[str, Any], stop: dict[str, Any]) -> int:
        sizes = [size for when, size in series if start["time"] <= when <= stop["time"]]
        return max(sizes, default=0)

    return {
        "own": marks["own"],
        "peak_reading": peak(begin, read),
        "peak_training": peak(read, end),
        "peak_steps": peak(read, saving),
        "peak_saving": peak(saving, end),
        "sliced": marks["sliced"],
        "hashed": marks["hashed"],
        "disk": end["disk"] - begin["disk"],
        "seconds_reading": read["time"] - begin["time"],
    }


def sizes(base: Path) -> dict[str, int]:
    """Bytes of the base, of its largest block, and of what lies in no block."""
    import re

    from loratune.models.weights import tensor_entries

    blocks: dict[str, int] = {}
    for name, entry in tensor_entries(base).items():
        found = re.search(r"\.layers\.(\d+)\.", name)
        block = found[1] if found else ""
        blocks[block] = blocks.get(block, 0) + entry.size
    rest = blocks.pop("", 0)
    return {"base": rest + sum(blocks.values()), "block": max(blocks.values()), "rest": rest}


def table(size: dict[str, int], runs: list[dict[str, Any]]) -> str:
    """The page's table, in MB of a million bytes."""

    def mb(number: float) -> str:
        return f"{number / 1e6:,.0f}"

    lines = [
        "| processes | share of one | itself | peak while reading | beyond itself and its share "
        "| peak in training | slices read, all processes | read from disk, all, × base |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        ranks, share = run["ranks"], size["base"] / run["processes"]
        worst = max(ranks, key=lambda rank: rank["peak_reading"] - rank["own"])
        beyond = worst["peak_reading"] - worst["own"] - share
        disk = sum(rank["disk"] for rank in ranks) / size["base"]
        sliced = sum(rank["sliced"] for rank in ranks)
        lines.append(
            f"| {run['processes']} | {mb(share)} | {mb(worst['own'])} | "
            f"{mb(worst['peak_reading'])} | {mb(beyond) if sliced else 'mapped'} | "
            f"{mb(max(rank['peak_training'] for rank in ranks))} | "
            f"{mb(sliced) if sliced else 'by transformers'} | {disk:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    if "--worker" in sys.argv:
        place = sys.argv.index("--worker")
        worker(Path(sys.argv[place + 1]), sys.argv[place + 2] == "1", sys.argv[place + 3 :])
        return
    found = common.parser(__doc__)
    found.add_argument("--base", type=Path, help="a bf16 model folder; written if not given")
    found.add_argument("--processes", default="1,2,4")
    found.add_argument("--only-reading", action="store_true", help="do not train")
    arguments = found.parse_args()
    options = common.options_of(arguments)
    shape = replace(models.MICRO, vocabulary=1024) if options.is_micro else OPT_1_3B
    with tempfile.TemporaryDirectory(prefix="loratune-bench-") as work:
        folder = Path(work)
        base = folder / "base"
        if arguments.base:
            shutil.copytree(arguments.base, base)  # its cache is emptied, and no other's
        else:
            write_base(base, shape, "2GB")
        size, runs = sizes(base), []
        for processes in map(int, arguments.processes.split(",")):
            runs.append(measure(base, folder, processes, not arguments.only_reading, LORA))
            common.say(table(size, runs).splitlines()[-1])
        common.say(table(size, runs))
    common.write_result("sharded_loading", options, {"settings": size, "runs": runs})


if __name__ == "__main__":
    main()
