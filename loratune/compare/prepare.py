"""Settle what is compared and what may be shared, before the first step of any training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratune.compare.matching import match_ranks, parse_match
from loratune.compare.plan import ComparisonPlan, VariantSearch
from loratune.compare.result import Twin
from loratune.compare.search import plan_search
from loratune.compare.settings import Options, Setting, named_settings
from loratune.compare.store import FAILED, Store, fingerprint
from loratune.compare.twins import find_twins, require_distinct
from loratune.compare.verdict import twin_in_words
from loratune.compare.workbench import Workbench
from loratune.config.convert import run_fields, to_plain
from loratune.config.schema import RunConfig
from loratune.config.secrets import redact
from loratune.console import say
from loratune.errors import LoratuneError, SeveralErrors, raise_together
from loratune.runs.output import OUTPUTS, TASK, check_output, check_unoccupied
from loratune.runs.provenance import package_versions
from loratune.training.optim import learning_rate

MEASURED = 3
"""Raised whenever a task measures something else than before: old results then do not count."""
_NOT_SHARED = (
    "name",
    "out",
    "resume",
    "launch",
    "gate",
    "gguf",
    "trackers",
    "stages",
    "merge",
    "export",
    "allow_drift",
    "adapter",
    "adapter_path",
)
_NOT_A_RESULT = (
    "target_loss",
    "seeds",
    "lr_points",
    "lr_factor",
    "rungs",
    "contenders",
    "margin",
    "train_twins",
)


def prepare(config: RunConfig, options: Options) -> tuple[Workbench, ComparisonPlan]:
    """Settle everything that can be wrong before the first step.

    Raises:
        LoratuneError: whatever is wrong.
    """
    check_output(config)
    if config.out is not None:
        check_unoccupied(Path(config.out), besides=[TASK])
    parse_match(options.match)
    _limit_threads(config, options)
    settings = named_settings(options.variants, config, options.folders)
    if options.match == "own":  # else only the base tells which ranks they get
        require_distinct([_search(options, setting, 1) for setting in settings])
    bench = Workbench(config)
    settings = _able(settings, bench, options, with_adapter=False)  # a budget counts the layers
    settings = match_ranks(settings, options.match, config, bench.architecture, bench.layers)
    settings = _able(settings, bench, options, with_adapter=True)
    searches = [_search(options, one, bench.steps(one.recipe)) for one in settings]
    require_distinct(searches)
    shared = _shared(config, bench)
    path = Path(config.out or OUTPUTS / config.name / f"compare-{fingerprint(shared)[:8]}")
    store = Store.open(path, shared)
    if (clock := bench.rows.clock) is not None:
        bench.stop_clock(store.clock(clock))
    searches, twins = _without_twins(searches, bench, train=config.compare.train_twins)
    seeds = [config.trainer.seed + number for number in range(options.seeds)]
    plan = ComparisonPlan(store, fingerprint(shared), searches, seeds, twins)
    if options.retry:
        _forget_failures(plan)
    for note in (*bench.rows.summary.notes, *map(twin_in_words, twins)):
        say(f"note: {note}")
    start = "continuing in" if (path / "trials").exists() else "working in"
    is_open = bool(plan.open_tasks())
    say(f"{start} {path}; about {plan.count()} tasks" if is_open else f"complete: {path}")
    return bench, plan


def _search(options: Options, setting: Setting, steps: int) -> VariantSearch:
    recipe = setting.recipe
    ratios: Sequence[float | None] = [setting.ratio]
    if setting.ratio is not None and options.ratio_grid is not None:
        ratios = [float(ratio) for ratio in options.ratio_grid]
    search = plan_search(
        learning_rate(recipe.trainer, recipe.adapter),
        steps,
        points=recipe.compare.lr_points,
        factor=recipe.compare.lr_factor,
        rungs=recipe.compare.rungs,
        grid=options.lr_grid,
        ratios=ratios,
    )
    return VariantSearch(setting, search)


def _able(
    settings: Sequence[Setting], bench: Workbench, options: Options, *, with_adapter: bool
) -> list[Setting]:
    """The contenders whose targets name layers and, if asked for, whose adapter takes them.

    Those that were named must all be able; of all variants the others are left out, with a note.

    Raises:
        LoratuneError: for each named one that is not able, or if none is.
    """
    able: list[Setting] = []
    errors: list[LoratuneError] = []
    for setting in settings:
        recipe = setting.recipe
        try:
            bench.layers(recipe.targets, recipe.adapter if with_adapter else None)
        except LoratuneError as error:
            parts = error.errors if isinstance(error, SeveralErrors) else [error]
            errors += [
                type(part)(part.cause, where=f"{setting.label}: {part.where}", fix=part.fix)
                for part in parts
            ]
        else:
            able.append(setting)
    is_every_variant = options.variants in (None, "all") and not bench.config.compare.contenders
    if not (able and is_every_variant):
        raise_together(errors)
    for one in errors:
        label, _, layer = one.where.partition(": ")
        say(f"note: {label} is left out: {one.cause} ({layer})")
    return able


def _without_twins(
    searches: Sequence[VariantSearch], bench: Workbench, *, train: bool
) -> tuple[list[VariantSearch], list[Twin]]:
    """What is trained, and which contenders are one training, or nearly."""
    twins, nearly = find_twins(searches, bench.layers)
    left_out = set() if train else {twin.label for twin in twins}
    trained = [one for one in searches if one.setting.label not in left_out]
    return trained, [*(replace(twin, trained=train) for twin in twins), *nearly]


def _limit_threads(config: RunConfig, options: Options) -> None:
    """Two threads on two busy cores are slower than one; several processes share the cores."""
    if config.trainer.threads is None:
        crowded = options.processes > 1 or (os.cpu_count() or 1) <= 2
        config.trainer = replace(config.trainer, threads=1 if crowded else None)


def _shared(config: RunConfig, bench: Workbench) -> dict[str, Any]:
    """What every task depends on, as plain values."""
    recipe = run_fields(to_plain(config))
    recipe = {key: value for key, value in recipe.items() if key not in _NOT_SHARED}
    for part, keys in (("compare", _NOT_A_RESULT), ("trainer", ("threads", "seed"))):
        recipe[part] = {key: value for key, value in recipe[part].items() if key not in keys}
    recipe["data"] |= dict.fromkeys(("path", "eval_path", "test_path", "cache"))
    recipe["compare"]["heldout_path"] = None
    recipe["evaluate"].pop("retention")
    return {
        "recipe": redact(recipe),
        "base": bench.base.fingerprint,
        "tokenizer": bench.base.tokenizer_fingerprint,
        "rows": bench.rows.summary.fingerprints,
        "split_seed": config.trainer.seed,
        "device": bench.base.device.type,
        "loratune": package_versions().get("loratune"),
        "measured": MEASURED,
        "heldout_curve": config.compare.target_loss is not None,
    }


def _forget_failures(plan: ComparisonPlan) -> None:
    for one in plan.searches:
        for (point, steps), trial in plan.trials(one).items():
            if trial.reason:
                plan.store.forget(plan.trial(one.setting, point, steps).cached)
        for run in plan.seed_runs(one):
            if FAILED in (plan.result(run) or {}):
                plan.store.forget(run.cached)
