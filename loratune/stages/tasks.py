"""Tasks of lm-eval (EleutherAI's evaluation harness), base and adapted side by side."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loratune.data.tokenizing import Tokenizer
from loratune.errors import ConfigError, DataError, LoratuneError, did_you_mean
from loratune.scoring.metric import MeanMetric
from loratune.scoring.resampling import Gain, gained
from loratune.surgery import WrappedModel, disabled


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: its name in lm-eval.
        metric: ``acc,none``: the metric and the filter of the answers, as lm-eval writes them.
        adapted: lm-eval's value for the adapted model.
        base: for the base.
        gain: adapted minus base, paired by document; ``None`` where documents have no value of
            their own that is averaged.
    """

    task: str
    metric: str
    adapted: float
    base: float | None
    gain: Gain | None


def require_lm_eval() -> None:
    """Check that lm-eval is installed, without importing it.

    Raises:
        ConfigError: if it is not.
    """
    if find_spec("lm_eval") is None:
        cause = "tasks need the package lm-eval"
        raise ConfigError(cause, where="tasks", fix="pip install 'loratune[lm-eval]'")


def evaluate_tasks(
    wrapped: WrappedModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    folder: Path | None,
    *,
    batch_size: int,
    limit: int | None,
    base: bool,
) -> list[TaskScore]:
    """What lm-eval measures on the model as it is in memory.

    Args:
        wrapped: the model, in eval mode.
        tokenizer: the model's.
        tasks: names of tasks; those that ``folder`` defines need nothing else.
        folder: YAML definitions of one's own, lm-eval's ``--include_path``.
        batch_size: documents at a time.
        limit: first documents of each task; ``None`` takes all.
        base: whether the base is measured too.

    Raises:
        ConfigError: an unknown task.
        DataError: a task that cannot be run, such as one whose documents are not on this machine.
    """
    require_lm_eval()
    manager = _manager(tasks, folder)

    def results() -> dict[str, Any]:
        return _results(wrapped.model, tokenizer, tasks, manager, batch_size, limit)

    adapted, before = results(), None
    if base:
        with disabled(wrapped):
            before = results()
    return list(_scores(adapted, before))


def _manager(tasks: Sequence[str], folder: Path | None) -> Any:
    """The catalogue of tasks: the folder's alone where it names all; lm-eval's own is long."""
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise ConfigError("no such folder", where=f"tasks_path={folder}")
    include = None if folder is None else str(folder)
    with _quiet():
        manager = TaskManager(include_path=include, include_defaults=folder is None)
        if not set(tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=include)
    for task in tasks:
        if task not in manager.all_tasks:
            fix = did_you_mean(task, manager.all_tasks)
            fix = fix or "set tasks_path=DIR to the folder whose YAML files define it"
            raise ConfigError(f"lm-eval has no task '{task}'", where="tasks", fix=fix)
    return manager


def _results(
    model: Any,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    manager: Any,
    batch_size: int,
    limit: int | None,
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        with _quiet():
            wrapper = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            return dict(
                simple_evaluate(model=wrapper, tasks=list(tasks), task_manager=manager, limit=limit)
                or {}
            )
    except LoratuneError:
        raise
    except Exception as error:  # tasks are other people's files and code
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"lm-eval cannot run {', '.join(tasks)}: {type(error).__name__}: {reason}",
            where="tasks",
            fix="run it with lm-eval's own command line to see more",
        ) from error


def _scores(adapted: Mapping[str, Any], base: Mapping[str, Any] | None) -> Iterator[TaskScore]:
    for task, values in adapted["results"].items():
        for key, value in values.items():
            metric, comma, _ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            before = None if base is None else float(base["results"][task][key])
            gain = None if base is None else _gain(adapted, base, task, key)
            yield TaskScore(task, key, float(value), before, gain)


def _gain(adapted: Mapping[str, Any], base: Mapping[str, Any], task: str, key: str) -> Gain | None:
    metric, _, filtered = key.partition(",")
    sides = []
    for side in (adapted, base):
        documents = [d for d in side["samples"].get(task, []) if d.get("filter") == filtered]
        values = [document.get(metric) for document in documents]
        if not values or not all(isinstance(value, (int, float)) for value in values):
            return None
        mean = sum(values) / len(values)
        if abs(mean - side["results"][task][key]) > 1e-9:  # aggregated otherwise than by the mean
            return None
        sides.append([[float(value)] for value in values])
    return gained(MeanMetric(key, lambda answer, references: 0.0), sides[0], sides[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's own log, and without a warning where warnings are errors."""
    import warnings

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
