"""``compare`` from start to end: settle what is compared, do the work, write what came out."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loratune import files
from loratune.compare import tables
from loratune.compare.assemble import Assembly
from loratune.compare.plan import ComparisonPlan, VariantSearch
from loratune.compare.result import Comparison
from loratune.compare.search import Search, plan_search
from loratune.compare.settings import Options, Setting, match_ranks, named_settings, parse_match
from loratune.compare.store import FAILED, MARKDOWN, RESULT, SECONDS, Store, fingerprint
from loratune.compare.verdict import verdict
from loratune.compare.work import do_all
from loratune.compare.workbench import Workbench
from loratune.config.convert import run_fields, to_plain
from loratune.config.schema import RunConfig
from loratune.config.secrets import redact
from loratune.console import say
from loratune.errors import Interrupted, LoratuneError, TrainingError
from loratune.runs.output import OUTPUTS, TASK, check_output, check_unoccupied
from loratune.runs.provenance import package_versions, provenance
from loratune.training.optim import learning_rate

MEASURED = 3
"""Raised whenever a task measures something else than before: old results then do not count."""
_NOT_SHARED = (
    "name",
    "out",
    "resume",
    "launch",
    "gate",
    "trackers",
    "stages",
    "merge",
    "export",
    "allow_drift",
    "adapter",
    "adapter_path",
)
_NOT_A_RESULT = ("target_loss", "seeds", "lr_points", "lr_factor", "rungs")


def compare(config: RunConfig, options: Options) -> tuple[Comparison, Path]:
    """Compare settings on a recipe's task; return the result and its folder.

    Raises:
        ConfigError: contradictory settings, an impossible budget, an unusable grid.
        DataError: unusable rows, or none to choose by.
        Interrupted: on SIGINT; what is finished is kept.
    """
    bench, plan = prepare(config, options)
    share_work(config, options, bench, plan)
    comparison, folder = assemble(config, options, bench, plan), plan.store.path
    files.write_json(folder / RESULT, comparison.to_dict())
    files.write_text(folder / MARKDOWN, tables.markdown(comparison))
    return comparison, folder


def prepare(config: RunConfig, options: Options) -> tuple[Workbench, ComparisonPlan]:
    """Settle everything that can be wrong before the first step.

    Raises:
        LoratuneError: whatever is wrong.
    """
    check_output(config)
    if config.out is not None:
        check_unoccupied(Path(config.out), besides=[TASK])
    parse_match(options.match)
    settings = named_settings(options.variants, config.adapter, options.folders)
    for setting in settings:
        _search(config, options, setting, config.trainer.steps or 1)
    _limit_threads(config, options)
    bench = Workbench(config)
    settings = match_ranks(
        settings,
        options.match,
        config.adapter,
        bench.architecture,
        bench.layers,
        config.targets.modules_to_save,
    )
    shared = _shared(config, bench)
    path = Path(config.out or OUTPUTS / config.name / f"compare-{fingerprint(shared)[:8]}")
    store = Store.open(path, shared)
    if (clock := bench.rows.clock) is not None:
        bench.stop_clock(store.clock(clock))
    searches = [VariantSearch(s, _search(config, options, s, bench.steps)) for s in settings]
    seeds = [config.trainer.seed + number for number in range(options.seeds)]
    plan = ComparisonPlan(store, fingerprint(shared), searches, seeds)
    if options.retry:
        _forget_failures(plan)
    for note in bench.rows.summary.notes:
        say(f"note: {note}")
    start = "continuing in" if (path / "trials").exists() else "working in"
    is_open = bool(plan.open_tasks())
    say(f"{start} {path}; about {plan.count()} tasks" if is_open else f"complete: {path}")
    return bench, plan


def _search(config: RunConfig, options: Options, setting: Setting, steps: int) -> Search:
    ratios: Sequence[float | None] = [setting.ratio]
    if setting.ratio is not None and options.ratio_grid is not None:
        ratios = [float(ratio) for ratio in options.ratio_grid]
    return plan_search(
        learning_rate(config.trainer, setting.config),
        steps,
        points=config.compare.lr_points,
        factor=config.compare.lr_factor,
        rungs=config.compare.rungs,
        grid=options.lr_grid,
        ratios=ratios,
    )


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
    recipe["data"] |= {"path": None, "eval_path": None, "test_path": None}
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


def share_work(config: RunConfig, options: Options, bench: Workbench, plan: ComparisonPlan) -> None:
    """Do every open task here, with as many other processes as the options ask for."""
    number, count = options.part
    try:
        with _other_processes(replace(config, out=str(plan.store.path)), options):
            do_all(bench, plan, first=(number - 1) / count, tell=say)
    except KeyboardInterrupt:
        fix = "give the same command again: what is finished is kept"
        raise Interrupted("interrupted", where=str(plan.store.path), fix=fix) from None


def _forget_failures(plan: ComparisonPlan) -> None:
    for one in plan.searches:
        for (point, steps), trial in plan.trials(one).items():
            if trial.reason:
                plan.store.forget(plan.trial(one.setting, point, steps).cached)
        for run in plan.seed_runs(one):
            if FAILED in (plan.result(run) or {}):
                plan.store.forget(run.cached)


@contextlib.contextmanager
def _other_processes(config: RunConfig, options: Options) -> Iterator[None]:
    """The other processes of this machine, at work on the same folder while the block runs."""
    context = multiprocessing.get_context("spawn")
    options = replace(options, retry=False)
    workers = [
        context.Process(target=_work, args=(config, options, number), daemon=True)
        for number in range(1, options.processes)
    ]
    for worker in workers:
        worker.start()
    try:
        yield
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    for worker in workers:
        worker.join()


def _work(config: RunConfig, options: Options, number: int) -> None:
    """Work of one more process; its output is the folder."""
    silent = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  lives as long as the process
    with contextlib.suppress(LoratuneError, KeyboardInterrupt), contextlib.redirect_stdout(silent):
        bench, plan = prepare(config, options)
        do_all(bench, plan, first=number / options.processes)


def assemble(
    config: RunConfig, options: Options, bench: Workbench, plan: ComparisonPlan
) -> Comparison:
    """The comparison that the finished tasks make."""
    assembly = Assembly(plan, config.compare.target_loss)
    base, parameters = bench.base, bench.architecture.base_parameters
    comparison = Comparison(
        name=config.name,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        seconds=sum(float(result.get(SECONDS, 0.0)) for result in plan.store.finished()),
        match=options.match,
        steps=bench.steps,
        seeds=list(plan.seeds),
        target_loss=assembly.target_loss,
        base=assembly.base(config.model.path, base.fingerprint, parameters),
        rows=bench.rows.summary,
        text_metrics=list(assembly.text_metrics),
        variants=assembly.variants,
        differences=assembly.differences,
        samples=assembly.samples(bench.rows.prompts, base.tokenizer),
        recipe=redact(run_fields(to_plain(config))),
        provenance={
            **redact(provenance(str(base.device))),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processes": options.processes,
            "dtype": str(base.dtype),
        },
    )
    return replace(comparison, findings=verdict(comparison).findings)


def require_a_result(comparison: Comparison, path: Path) -> None:
    """Check that at least one variant was trained to the end.

    Raises:
        TrainingError: if every final training failed.
    """
    if all(variant.reason for variant in comparison.variants):
        reasons = dict.fromkeys(variant.reason for variant in comparison.variants)
        raise TrainingError(
            f"every training failed: {'; '.join(reasons)}",
            where=str(path),
            fix="lower lr_grid, then give the same command with retry=true",
        )
