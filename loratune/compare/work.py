"""Do the pieces of a comparison, alone or together with other processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from loratune.compare.plan import FAILED, SECONDS, ComparisonPlan, Work
from loratune.compare.store import MOST_DEATHS, Store
from loratune.compare.workbench import FAILURES, Measured, Workbench, failure_reason

WAIT_SECONDS = 0.3


def do_all(
    bench: Workbench,
    plan: ComparisonPlan,
    store: Store,
    *,
    first: float = 0.0,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Work until nothing is open; wait while the last pieces are in other processes' hands.

    Args:
        bench: the loaded base.
        plan: what there is to do.
        store: where results lie.
        first: share of the open pieces to pass over at the start, so that processes that begin
            together do not begin with the same.
        tell: is given one line for each finished piece.

    Raises:
        LoratuneError: if the base model itself cannot be measured, or a stop was asked for.
    """
    while open_work := plan.open_work(store):
        start = int(first * len(open_work))
        if not any(_try(bench, plan, store, work, tell) for work in _turned(open_work, start)):
            time.sleep(WAIT_SECONDS)


def _turned(work: list[Work], start: int) -> list[Work]:
    return work[start:] + work[:start]


def _try(
    bench: Workbench, plan: ComparisonPlan, store: Store, work: Work, tell: Callable[[str], None]
) -> bool:
    """Do one piece unless another process is at it; whether the list of open pieces changed."""
    with store.claim(work.piece) as deaths:
        if deaths is None:
            return False
        if store.read(work.piece) is not None:
            return True
        started = time.perf_counter()
        if deaths >= MOST_DEATHS:
            result = {FAILED: f"its process died {deaths} times (out of memory?)"}
        else:
            result = _result(bench, work)
        seconds = time.perf_counter() - started
        store.write(work.piece, {**result, SECONDS: seconds})
    done = len(store.finished())
    total = max(plan.count(), done + plan.left(store))
    tell(f"[{done}/{total}] {work.title}: {_outcome(result)} ({seconds:.1f} s)")
    return True


def _result(bench: Workbench, work: Work) -> dict[str, Any]:
    """The piece's result as plain values."""
    contender, point = work.contender, work.point
    if contender is None:
        return _plain(bench.base_scores())
    if point is None:
        return asdict(bench.costs(contender.config))
    if work.piece.kind == "trials":
        return asdict(bench.trial(contender.config, point, work.steps))
    try:
        return _plain(bench.member(point.applied(contender.config), work.seed))
    except FAILURES as error:
        return {FAILED: failure_reason(error)}


def _plain(measured: Measured) -> dict[str, Any]:
    return asdict(measured)


def _outcome(result: dict[str, Any]) -> str:
    if reason := result.get(FAILED) or result.get("reason"):
        return f"failed: {reason}"
    if "member" in result:
        exact = result["member"]["exact_match"]
        tail = "" if exact is None else f", exact match {exact:.1%}"
        return f"loss {result['member']['loss']:.4f}{tail}"
    return f"dev loss {result['loss']:.4f}" if "loss" in result else "counted"
