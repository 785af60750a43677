"""Do the tasks of a comparison, alone or together with other processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from loratune.compare.plan import ComparisonPlan, Task
from loratune.compare.store import FAILED, MOST_DEATHS, SECONDS
from loratune.compare.workbench import FAILURES, Workbench, failure_reason

WAIT_SECONDS = 0.3


def do_all(
    bench: Workbench,
    plan: ComparisonPlan,
    *,
    first: float = 0.0,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Work until nothing is open; wait while the last tasks are in other processes' hands.

    Args:
        bench: the loaded base.
        plan: what there is to do.
        first: share of the open tasks to pass over at the start, so that processes that begin
            together do not begin with the same.
        tell: is given one line for each finished task.

    Raises:
        LoratuneError: if the base model itself cannot be measured, or a stop was asked for.
    """
    while tasks := plan.open_tasks():
        start = int(first * len(tasks))
        rotated = tasks[start:] + tasks[:start]
        if not any(_try(bench, plan, task, tell) for task in rotated):
            time.sleep(WAIT_SECONDS)


def _try(bench: Workbench, plan: ComparisonPlan, task: Task, tell: Callable[[str], None]) -> bool:
    """Do one task unless another process is at it; whether the list of open tasks changed."""
    with plan.store.claim(task.cached) as deaths:
        if deaths is None:
            return False
        if plan.result(task) is not None:
            return True
        started = time.perf_counter()
        if deaths >= MOST_DEATHS:
            result = {FAILED: f"its process died {deaths} times (out of memory?)"}
        else:
            result = _result(bench, task)
        seconds = time.perf_counter() - started
        plan.store.write(task.cached, {**result, SECONDS: seconds})
    done = len(plan.store.finished())
    total = max(plan.count(), done + plan.left())
    tell(f"[{done}/{total}] {task.title}: {_outcome(result)} ({seconds:.1f} s)")
    return True


def _result(bench: Workbench, task: Task) -> dict[str, Any]:
    """The task's result as plain values."""
    setting, point = task.setting, task.point
    if setting is None:
        return asdict(bench.base_scores())
    if point is None:
        return asdict(bench.costs(setting.recipe))
    if task.cached.kind == "trials":
        return asdict(bench.trial(setting.recipe, point, task.steps))
    try:
        chosen = setting.with_adapter(point.applied(setting.config))
        return asdict(bench.seed_run(chosen.recipe, task.seed))
    except FAILURES as error:
        return {FAILED: failure_reason(error)}


def _outcome(result: dict[str, Any]) -> str:
    if reason := result.get(FAILED) or result.get("reason"):
        return f"failed: {reason}"
    if "member" in result:
        exact = result["member"]["exact_match"]
        tail = "" if exact is None else f", exact match {exact:.1%}"
        return f"loss {result['member']['loss']:.4f}{tail}"
    return f"dev loss {result['loss']:.4f}" if "loss" in result else "counted"
