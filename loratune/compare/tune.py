"""``tune``: find one variant's best learning rate and write a recipe that uses it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from loratune import files
from loratune.compare.prepare import prepare
from loratune.compare.result import Trial
from loratune.compare.run import share_work
from loratune.compare.search import Point, search_axis
from loratune.compare.settings import Options
from loratune.config.schema import RunConfig
from loratune.errors import StorageError, TrainingError
from loratune.runs.output import check_outside_sources


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        point: the best learning rate, and value of the setting searched beside it.
        axis: name of that setting, empty if there is none.
        loss: its dev loss after the full number of steps.
        at_edge: whether a better rate may lie beyond those tried.
        trials: everything tried.
        recipe: the file written.
    """

    point: Point
    axis: str
    loss: float
    at_edge: bool
    trials: Sequence[Trial]
    recipe: Path


def tune(config: RunConfig, options: Options, base_recipe: str | None, target: Path) -> Tuned:
    """Search, and write the recipe.

    Args:
        config: the recipe; its adapter is what is tuned.
        options: grids; its variants and seeds are not used.
        base_recipe: the recipe that the new one starts from, if one was chosen.
        target: the YAML file to write.

    Raises:
        TrainingError: if no rate was usable.
        StorageError: if ``target`` is something else than a recipe written here.
        BusyError: if it lies in the base model's folder.
    """
    check_outside_sources(target, config)
    _check_own_recipe(target)
    axis = search_axis(config.adapter)
    if options.ratio_grid is None and axis:
        options = replace(options, ratio_grid=config.adapter.search_axes()[axis])
    options = replace(options, variants=[config.adapter.variant], seeds=0, match="own")
    config = replace(config, compare=replace(config.compare, contenders={}))
    bench, plan = prepare(config, options)
    share_work(config, options, bench, plan)
    [one] = plan.searches
    trials = plan.trials(one)
    point = one.search.winner(trials)
    if point is None:
        reasons = {trial.reason for trial in trials.values() if trial.reason}
        raise TrainingError(
            f"no learning rate was usable: {'; '.join(sorted(reasons))}",
            where=str(plan.store.path),
            fix="give lower rates as lr_grid",
        )
    loss = trials[point, one.search.rungs[-1]].loss
    assert loss is not None
    with files.storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(target, recipe_text(config, point, loss, base_recipe, target.stem))
    at_edge = one.search.is_at_edge(point, trials)
    return Tuned(point, axis, loss, at_edge, list(trials.values()), target)


MARK = "# written by `loratune tune`"


def recipe_text(
    config: RunConfig, point: Point, loss: float, base_recipe: str | None, name: str
) -> str:
    """The recipe: the one it starts from, the adapter, and the values found."""
    variant = config.adapter.variant
    defaults: list[object] = [base_recipe] if base_recipe else []
    defaults.append({"override /adapter": variant})
    values: dict[str, object] = {"name": name, "trainer": {"lr": point.lr}}
    if point.ratio is not None:
        values["adapter"] = {search_axis(config.adapter): point.ratio}
    body = yaml.safe_dump({"defaults": defaults, **values}, sort_keys=False, allow_unicode=True)
    steps = config.compare.steps or config.trainer.steps or f"{config.trainer.epochs} epochs of"
    head = [
        "# @package _global_",
        f"# loratune train recipe={name}",
        f"{MARK} on {time.strftime('%Y-%m-%d')}: dev loss {loss:.4f} after {steps} steps.",
        f"# The rate is {variant}'s: another adapter needs its own.",
    ]
    return "\n".join(head) + "\n" + body


def _check_own_recipe(target: Path) -> None:
    """Never write over a recipe that a person made."""
    if not target.exists():
        return
    if not target.is_file() or MARK not in target.read_text(encoding="utf-8", errors="replace"):
        raise StorageError(
            "a file that tune did not write is in the way",
            where=str(target),
            fix="give another out=",
        )


def curve(trials: Sequence[Trial], width: int = 40) -> list[str]:
    """The dev loss of every rate on its longest rung, as bars: shorter is better."""
    longest = {(t.lr_ratio or 0.0, t.lr): t for t in sorted(trials, key=lambda t: t.steps)}
    losses = [trial.loss for trial in longest.values() if trial.loss is not None]
    top = max(losses, default=1.0) or 1.0
    lines = []
    for (ratio, lr), trial in sorted(longest.items()):
        label = f"lr {lr:<9.4g}" + (f" ratio {ratio:<4g}" if ratio else "")
        if trial.loss is None:
            lines.append(f"{label} {trial.steps:>5} steps  failed: {trial.reason}")
            continue
        bar = "█" * max(1, round(width * trial.loss / top))
        lines.append(f"{label} {trial.steps:>5} steps  {trial.loss:8.4f} {bar}")
    return lines
