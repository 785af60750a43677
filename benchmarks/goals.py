"""What the project holds itself to, and what the results say about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Mapping[str, Any]]
"""Benchmark name → what its file holds; a benchmark that never ran is missing."""
MIB = 1 << 20


@dataclass(frozen=True)
class Goal:
    """One figure to reach.

    Attributes:
        name: what is measured.
        limit: the number to reach.
        at_most: whether the limit is an upper one.
        unit: written behind both numbers.
        value: the measured number; raises ``KeyError`` where nothing was measured.
    """

    name: str
    limit: float
    at_most: bool
    unit: str
    value: Callable[[Results], float]

    def measured(self, results: Results) -> float | None:
        """The measured number, or ``None`` where there is no result."""
        try:
            return self.value(results)
        except KeyError:
            return None

    def is_met(self, value: float) -> bool:
        """Whether a measured number keeps the limit, before any rounding for the page."""
        return value <= self.limit if self.at_most else value >= self.limit


def named(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The row of that name; ``KeyError`` if there is none."""
    for row in rows:
        if row["name"] == name:
            return row
    raise KeyError(name)


def step_ratio(table: str, name: str) -> Callable[[Results], float]:
    """A candidate's step time relative to the floor."""

    def value(results: Results) -> float:
        rows = results["step"]["tables"][table]["rows"]
        return float(named(rows, name)["ratio"]["median"])

    return value


def fa_against_lora(benchmark: str, table: str) -> Callable[[Results], float]:
    """LoRA-FA's time relative to LoRA's, both loratune's."""

    def value(results: Results) -> float:
        rows = results[benchmark]["tables"][table]["rows"]
        own, other = named(rows, "loratune LoRA-FA"), named(rows, "loratune LoRA")
        return float(own["ratio"]["median"] / other["ratio"]["median"])

    return value


def saved_numbers(variant: str, name: str) -> Callable[[Results], float]:
    """Saved bytes as a multiple of r numbers a token and module; the worst of all cases."""

    def value(results: Results) -> float:
        step = results["step"]
        size = {"float32": 4, "bfloat16": 2}
        numbers = step["rank_numbers"][variant]
        rows = [row for row in step["saved"] if row["name"] == name]
        return float(max(row["bytes"] / (numbers * size[row["dtype"]]) for row in rows))

    return value


def rate_against(
    own: str, other: str, benchmark: str = "e2e", group: str = "fp32"
) -> Callable[[Results], float]:
    """Rows per second of one contender relative to another's, both in one group."""

    def value(results: Results) -> float:
        rows = results[benchmark]["groups"][group]
        return float(named(rows, own)["rows_per_second"] / named(rows, other)["rows_per_second"])

    return value


def real_rate(other: str, group: str) -> Callable[[Results], float]:
    """The same of the real model, with sharing."""
    return rate_against("loratune", other, "real", group)


def real_memory(results: Results) -> float:
    """Peak memory relative to TRL's as shipped, on Banking77 in fp32."""
    rows = results["real"]["groups"]["banking77_fp32"]
    own, other = named(rows, "loratune"), named(rows, "TRL + PEFT, as shipped")
    return float(own["peak_bytes"] / other["peak_bytes"])


def long_list(start: str, key: str) -> Callable[[Results], float]:
    """Of the longest list of rows."""
    return lambda results: float(results["long_list"]["rows"][-1][start][key])


def long_list_memory(results: Results) -> float:
    """Peak memory of a start from the cache: the longest list's beside the shortest's, in MB."""
    rows = results["long_list"]["rows"]
    return float((rows[-1]["second"]["peak"] - rows[0]["second"]["peak"]) / 1e6)


def recompiled(results: Results) -> float:
    """How often the compiler worked for a new length."""
    return float(sum(one["recompiled"] for one in results["compiling"]["trials"].values()))


def merge_ratio(targets: str) -> Callable[[Results], float]:
    """Merging relative to copying, hashing and syncing."""

    def value(results: Results) -> float:
        row = named(results["merge"]["rows"], f"loratune merge, {targets}")
        return float(row["ratio"]["median"])

    return value


def merge_memory(results: Results) -> float:
    """Peak memory of the merge beyond the largest shard, in MB."""
    row = named(results["merge"]["rows"], "loratune merge, all linear layers")
    return float((row["peak_bytes"] - results["merge"]["settings"]["largest_shard"]) / 1e6)


def startup(name: str) -> Callable[[Results], float]:
    """Median seconds of a command."""
    return lambda results: float(named(results["startup"]["rows"], name)["seconds"]["median"])


SHIPPED, BEST = "TRL + PEFT, fp32, as shipped", "TRL + PEFT, fp32, best padded"
GOALS = [
    Goal("LoRA r16, step / floor", 1.10, True, "", step_ratio("short", "loratune LoRA")),
    Goal("LoRA-FA r16, step / floor", 1.07, True, "", step_ratio("short", "loratune LoRA-FA")),
    Goal("VeRA r256, step / floor", 1.30, True, "", step_ratio("short", "loratune VeRA")),
    Goal(
        "VeRA r256, 4,096 tokens, step / floor",
        1.24, True, "", step_ratio("long", "loratune VeRA"),
    ),
    Goal("LoRA-FA against LoRA, CPU: time", 0.97, True, "", fa_against_lora("step", "short")),
    Goal(
        "LoRA-FA against LoRA, CUDA: time",
        1.0, True, "", fa_against_lora("cuda", "large_bfloat16"),
    ),
    Goal(
        "LoRA-FA saves r numbers a token and module, at most",
        1.0, True, "×", saved_numbers("lora_fa", "loratune LoRA-FA"),
    ),
    Goal(
        "VeRA saves r numbers a token and module, at most",
        1.0, True, "×", saved_numbers("vera", "loratune VeRA"),
    ),
    Goal(
        "rows/s against TRL + PEFT as shipped, both fp32",
        2.5, False, "×", rate_against("loratune, fp32", SHIPPED),
    ),
    Goal(
        "rows/s against TRL + PEFT at its best, both fp32",
        2.5, False, "×", rate_against("loratune, fp32", BEST),
    ),
    Goal(
        "rows/s in bf16 against TRL + PEFT as shipped in fp32",
        5.0, False, "×", rate_against("loratune, bf16", SHIPPED),
    ),
    Goal(
        "SmolLM2, Banking77: rows/s against TRL + PEFT as shipped, fp32",
        7.0, False, "×", real_rate("TRL + PEFT, as shipped", "banking77_fp32"),
    ),
    Goal(
        "SmolLM2, Banking77: rows/s against TRL + PEFT at its best, fp32",
        4.0, False, "×", real_rate("TRL + PEFT, rows in our order", "banking77_fp32"),
    ),
    Goal(
        "SmolLM2, E2E NLG: rows/s against TRL + PEFT as shipped, fp32",
        3.0, False, "×", real_rate("TRL + PEFT, as shipped", "e2e_fp32"),
    ),
    Goal(
        "SmolLM2, E2E NLG: rows/s against TRL + PEFT at its best, fp32",
        2.5, False, "×", real_rate("TRL + PEFT, rows in our order", "e2e_fp32"),
    ),
    Goal(
        "SmolLM2, Banking77: peak memory / TRL + PEFT's as shipped, fp32",
        0.5, True, "", real_memory,
    ),
    Goal("torch.compile works again for a new length", 0.0, True, " times", recompiled),
    Goal("merge of q and v, time / copy", 1.5, True, "", merge_ratio("q and v")),
    Goal("merge of all layers, time / copy", 1.5, True, "", merge_ratio("all linear layers")),
    Goal("merge, peak memory beyond the largest shard", 600.0, True, " MB", merge_memory),
    Goal("loratune --help", 0.1, True, " s", startup("loratune --help")),
    Goal(
        "count-params of a known model",
        0.5, True, " s", startup("loratune count-params model=opt_125m"),
    ),
    Goal(
        "first step of recipe=smoke after the imports",
        2.0, True, " s", startup("first step of recipe=smoke, after those imports"),
    ),
    Goal(
        "first step of the second start with two million rows",
        20.0, True, " s", long_list("second", "first_step"),
    ),
    Goal(
        "its peak memory beyond that with 20,000 rows",
        60.0, True, " MB", long_list_memory,
    ),
]  # fmt: skip
