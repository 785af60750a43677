"""(a) One training step of every variant against the frozen model's floor and against PEFT.

The floor is forward, head and loss of the frozen base plus backward to its inputs.  Every
candidate uses the same model, head and loss, so that the ratio shows the adapter alone; one row
more shows what loratune's own loss head makes of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, models
from benchmarks.memory import saved_bytes
from loratune.adapters.config import AdapterConfig, Kernel
from loratune.adapters.registry import variant_names
from loratune.loss.causal_model import LanguageModelHead
from loratune.loss.supervised import causal_targets

FLOOR = "floor"


@dataclass(frozen=True)
class Plan:
    """Sizes and repetitions; ``wide_rank`` is for variants whose own rank is far above LoRA's."""

    shape: models.Shape
    batch: int
    long_batch: int
    length: int
    rank: int
    wide_rank: int
    rounds: int
    long_rounds: int

    def settings(self, variant: str) -> AdapterConfig:
        """A variant at its rank."""
        return models.settings_at(variant, self.rank, self.wide_rank)


FULL = Plan(models.OPT_125M, 4, 32, 128, 16, 256, 9, 3)
MICRO = Plan(models.MICRO, 2, 4, 8, 4, 8, 2, 1)


@dataclass(frozen=True)
class Candidate:
    """An adapted model to measure.

    Attributes:
        settings: the variant's.
        is_ours: loratune's model, or PEFT's.
    """

    settings: AdapterConfig
    is_ours: bool = True

    @property
    def name(self) -> str:
        """Whose it is, the variant, and the kernel where it is the readable one."""
        title = models.title(self.settings.variant)
        if not self.is_ours:
            return f"PEFT {title}"
        is_reference = self.settings.kernel is Kernel.reference
        return f"loratune {title}" + (", reference kernel" if is_reference else "")

    def build(self, base: Any, dropout: float = 0.0) -> Any:
        """The frozen base with the adapter."""
        settings = replace(self.settings, dropout=dropout)
        return models.ours(base, settings) if self.is_ours else models.theirs(base, settings)


def candidates(plan: Plan) -> dict[str, Candidate]:
    """Every variant, with its readable kernel where it has two, and PEFT's; by name."""
    own = [plan.settings(variant) for variant in variant_names()]
    readable = [
        replace(settings, kernel=Kernel.reference)
        for settings in own
        if "kernel" not in settings.without_effect
    ]
    peft = [plan.settings(variant) for variant in models.peft_counterparts()]
    listed = [*map(Candidate, [*own, *readable]), *(Candidate(each, False) for each in peft)]
    return {candidate.name: candidate for candidate in listed}


def wide_names(plan: Plan) -> list[str]:
    """Candidates whose rank makes the number of tokens matter."""
    return [
        name
        for name, candidate in candidates(plan).items()
        if not name.endswith("kernel") and models.is_wide(candidate.settings.variant)
    ]


def timed(
    plan: Plan,
    base: Any,
    names: list[str],
    batch: int,
    rounds: int,
    now: Callable[[], float],
    *,
    own_head: bool = False,
) -> dict[str, Any]:
    """Step times of the named candidates on ``batch`` rows, as a table."""
    ids = models.token_ids(plan.shape, batch, plan.length)
    chosen = candidates(plan)
    steps: dict[str, Callable[[], object]] = {FLOOR: models.floor_step(base, ids)}
    built = {name: chosen[name].build(base) for name in names}
    steps |= {name: models.adapter_step(model, ids) for name, model in built.items()}
    if own_head:
        steps["loratune LoRA, own loss head"] = own_head_step(built["loratune LoRA"], ids)
    seconds = common.interleaved(steps, rounds, now=now)
    for name, values in seconds.items():
        common.say(f"  {name}: {common.Spread.of(values).median:.3f} s")
    rows = common.timing_rows(seconds, FLOOR)
    for row in rows:
        if row["name"] in built:
            row["optimizer_seconds"] = optimizer_seconds(built[row["name"]], ids)
    return {"dtype": _name(base), "batch": batch, "length": plan.length, "rows": rows}


def own_head_step(model: Any, ids: Tensor) -> Callable[[], None]:
    """The step with loratune's chunked loss head, all tokens supervised."""
    head = LanguageModelHead(model)

    def step() -> None:
        loss = head(ids, causal_targets(ids))
        (loss.total / loss.tokens).backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def optimizer_seconds(model: Any, ids: Tensor, repeats: int = 9) -> float:
    """Median seconds of one AdamW step over what trains."""
    model(input_ids=ids[:1], labels=ids[:1], use_cache=False).loss.backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    optimizer.zero_grad()
    return common.Spread.of(seconds).median


def saved(plan: Plan, bases: Mapping[torch.dtype, Any]) -> list[dict[str, Any]]:
    """Bytes kept for the backward pass beyond the frozen model's, with and without dropout."""
    ids = models.token_ids(plan.shape, plan.batch, plan.length)
    rows = []
    for dtype, base in bases.items():
        least = saved_bytes(base, ids)
        for dropout in (0.0, 0.1):
            for name, candidate in candidates(plan).items():
                if dropout and "dropout" in candidate.settings.without_effect:
                    continue
                extra = saved_bytes(candidate.build(base, dropout), ids) - least
                rows.append(
                    {"name": name, "dtype": str(dtype)[6:], "dropout": dropout, "bytes": extra}
                )
        common.say(f"  saved bytes in {dtype} counted")
    return rows


def rank_numbers(plan: Plan) -> dict[str, int]:
    """Numbers that r a token and module come to, for every variant's rank."""
    modules = len(models.LINEAR) * plan.shape.layers
    tokens = plan.batch * plan.length
    own = [plan.settings(variant) for variant in variant_names()]
    return {each.variant: modules * tokens * each.rank for each in own}


def _name(base: Any) -> str:
    return str(next(base.parameters()).dtype)[6:]


def main() -> None:
    found = common.parser(__doc__)
    found.add_argument("--brief", action="store_true", help="fewer candidates and rounds")
    found.add_argument("--keep-saved", action="store_true", help="saved bytes as counted before")
    arguments = found.parse_args()
    options = common.options_of(arguments)
    plan = MICRO if options.is_micro else FULL
    names = list(candidates(plan))
    fast = [name for name in names if not name.endswith("kernel")]
    if arguments.brief:
        plan, names = replace(plan, rounds=3, long_rounds=1), fast
    torch.set_num_threads(options.threads)
    base = models.frozen_opt(plan.shape)
    half = models.frozen_opt(plan.shape, torch.bfloat16)
    bases = {torch.float32: base, torch.bfloat16: half}
    earlier = options.results / "step.json"
    # Counts are exact and need no second time.
    before = json.loads(earlier.read_text()) if arguments.keep_saved else None
    tables: dict[str, Any] = {}
    content = {
        "settings": {"rank": plan.rank, "wide_rank": plan.wide_rank, "shape": vars(plan.shape)},
        "tables": tables,
        "rank_numbers": rank_numbers(plan),
        "saved": before["saved"] if before else saved(plan, bases),
    }
    common.write_result("step", options, content)  # what is there should a later part be cut off
    common.say(f"fp32, {plan.batch} x {plan.length} tokens")
    tables["short"] = timed(plan, base, names, plan.batch, plan.rounds, options.now, own_head=True)
    common.write_result("step", options, content)
    common.say(f"bf16, {plan.batch} x {plan.length} tokens")
    tables["half"] = timed(plan, half, fast, plan.batch, plan.rounds, options.now)
    common.write_result("step", options, content)
    common.say(f"fp32, {plan.long_batch} x {plan.length} tokens")
    tables["long"] = timed(
        plan, base, wide_names(plan), plan.long_batch, plan.long_rounds, options.now
    )
    common.write_result("step", options, content)


if __name__ == "__main__":
    main()
