"""What every benchmark shares: options, interleaved timing, and the record of where and when."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
PARTS = (
    "step", "e2e", "real", "growth", "compiling",
    "scaling", "merge", "startup", "long_list", "cuda",
)  # fmt: skip
"""What the page of performance is made of."""
THREADS = 2
_PACKAGES = (
    "loratune", "torch", "transformers", "peft", "trl", "accelerate", "safetensors", "bitsandbytes",
)  # fmt: skip
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Options:
    """How one benchmark runs.

    Attributes:
        size: ``full`` for numbers worth keeping, ``micro`` to see that the script works.
        results: folder that gets ``NAME.json``.
        threads: CPU threads.
        clock: ``wall``, or ``cpu`` seconds of this process for a machine that others share (one
            thread then: threads that wait for each other count as work).
    """

    size: str
    results: Path
    threads: int
    clock: str = "wall"

    def now(self) -> float:
        """The chosen clock, in seconds."""
        return time.process_time() if self.clock == "cpu" else time.perf_counter()

    @property
    def is_micro(self) -> bool:
        """Whether only the script itself is tried."""
        return self.size == "micro"

    def arguments(self) -> list[str]:
        """The command line that gives these options."""
        folder = str(self.results.resolve())
        words = ["--size", self.size, "--results", folder, "--threads", str(self.threads)]
        return [*words, "--clock", self.clock]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options all benchmarks take."""
    found = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    found.add_argument("--size", choices=["full", "micro"], default="full")
    found.add_argument("--results", type=Path, default=RESULTS)
    found.add_argument("--threads", type=int, default=min(THREADS, os.cpu_count() or 1))
    found.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    return found


def options_of(arguments: argparse.Namespace) -> Options:
    """The parsed options."""
    threads = 1 if arguments.clock == "cpu" else arguments.threads
    return Options(arguments.size, arguments.results, threads, arguments.clock)


def parse(description: str | None) -> Options:
    """Parse the command line of a benchmark that has no options of its own."""
    return options_of(parser(description).parse_args())


# -- timing --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of ``n`` values."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; a single one is its own quartiles."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3, len(values))


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round.

    Each round runs all candidates once, beginning with another one each time, so that a slow
    minute of the machine or a warm cache falls on all of them alike.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        first = number % len(names)
        gc.collect()
        for name in names[first:] + names[:first]:
            started = now()
            candidates[name]()
            if number >= 0:
                seconds[name].append(now() - started)
    return seconds


def timing_rows(seconds: Mapping[str, Sequence[float]], floor: str) -> list[dict[str, Any]]:
    """One row per candidate: its seconds, and its ratio to the floor of the same round."""
    rows = []
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds[floor], strict=True)]
        rows.append(
            {"name": name, "seconds": asdict(Spread.of(values)), "ratio": asdict(Spread.of(ratios))}
        )
    return rows


# -- records -------------------------------------------------------------------------------


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    facts = _cpu_facts()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": facts.get("model name", platform.processor() or platform.machine()),
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in facts.get("flags", "").split()],
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(memory / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu_facts() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def versions() -> dict[str, str]:
    """Versions of what takes part."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def revision() -> str | None:
    """The last commit of the package, marked where its files differ from it."""
    commit = _git("log", "-1", "--format=%h", "--abbrev=10", "--", "loratune")
    if not commit:
        return None
    return f"{commit}+changes" if _git("status", "--porcelain", "--", "loratune") else commit


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def write_result(name: str, options: Options, content: Mapping[str, Any]) -> Path:
    """Write ``NAME.json`` with machine, versions and date around ``content``."""
    options.results.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "size": options.size,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "revision": revision(),
        "clock": options.clock,
        "machine": machine(options.threads),
        "versions": versions(),
        **content,
    }
    path = options.results / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    text = json.dumps(_rounded(record), indent=1, ensure_ascii=False, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)
    print(f"wrote {path.name}", flush=True)
    return path


def _rounded(value: Any) -> Any:
    """Six significant digits are more than any timing has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def say(text: str) -> None:
    """Progress on standard output."""
    print(text, flush=True)
