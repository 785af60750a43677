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
from loratune.compare.contenders import Contender, contenders, matched, parse_match
from loratune.compare.options import Options
from loratune.compare.plan import FAILED, SECONDS, ComparisonPlan, VariantSearch
from loratune.compare.result import Comparison
from loratune.compare.search import Search, plan_search
from loratune.compare.store import MARKDOWN, RESULT, Store, fingerprint
from loratune.compare.verdict import verdict
from loratune.compare.work import do_all
from loratune.compare.workbench import Workbench
from loratune.config.convert import run_fields, to_plain
from loratune.config.schema import RunConfig
from loratune.config.secrets import redact
from loratune.console import say
from loratune.errors import Interrupted, LoratuneError, TrainingError
from loratune.runs.provenance import package_versions, provenance
from loratune.training.optim import learning_rate

MEASURED = 2
"""Raised whenever a task measures something else than before: old results then do not count."""
_NOT_SHARED = (
    "name",
    "out",
    "resume",
    "launch",
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
    bench, plan, store = prepare(config, options)
    share_work(config, options, bench, plan, store)
    comparison = assemble(config, options, bench, plan, store)
    files.write_json(store.path / RESULT, comparison.to_dict())
    files.write_text(store.path / MARKDOWN, tables.markdown(comparison))
    return comparison, store.path


def prepare(config: RunConfig, options: Options) -> tuple[Workbench, ComparisonPlan, Store]:
    """Settle everything that can be wrong before the first step.

    Raises:
        LoratuneError: whatever is wrong.
    """
    parse_match(options.match)
    wanted = contenders(options.variants, config.adapter, options.folders)
    searches = [_search(config, options, one, config.trainer.steps or 1) for one in wanted]
    _limit_threads(config, options)
    bench = Workbench(config)
    chosen = matched(
        wanted,
        options.match,
        config.adapter,
        bench.architecture,
        bench.layers,
        config.targets.modules_to_save,
    )
    searches = [_search(config, options, one, bench.steps) for one in chosen]
    shared = _shared(config, bench)
    seeds = [config.trainer.seed + number for number in range(options.seeds)]
    pairs = [VariantSearch(one, search) for one, search in zip(chosen, searches, strict=True)]
    plan = ComparisonPlan(fingerprint(shared), pairs, seeds)
    path = config.out or f"outputs/{config.name}/compare-{fingerprint(shared)[:8]}"
    store = Store.open(Path(path), shared)
    if options.retry:
        _forget_failures(plan, store)
    for note in bench.rows.summary.notes:
        say(f"note: {note}")
    missing = len(plan.open_tasks(store))
    start = "continuing in" if (store.path / "trials").exists() else "working in"
    say(f"{start} {store.path}; about {plan.count()} tasks" if missing else f"complete: {path}")
    return bench, plan, store


def _search(config: RunConfig, options: Options, one: Contender, steps: int) -> Search:
    own = config.compare
    ratios: Sequence[float | None] = [one.ratio]
    if one.ratio is not None and options.ratio_grid is not None:
        ratios = [float(ratio) for ratio in options.ratio_grid]
    return plan_search(
        learning_rate(config.trainer, one.config),
        steps,
        points=own.lr_points,
        factor=own.lr_factor,
        rungs=own.rungs,
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
    settings = {key: value for key, value in recipe.items() if key not in _NOT_SHARED}
    for key in _NOT_A_RESULT:
        settings["compare"].pop(key, None)
    settings["trainer"].pop("threads", None)
    settings["trainer"].pop("seed", None)
    settings["data"] |= {"path": None, "eval_path": None, "test_path": None}
    settings["compare"]["heldout_path"] = None
    return {
        "recipe": redact(settings),
        "base": bench.base.fingerprint,
        "rows": bench.rows.summary.fingerprints,
        "split_seed": config.trainer.seed,
        "device": bench.base.device.type,
        "loratune": package_versions().get("loratune"),
        "measured": MEASURED,
    }


def share_work(
    config: RunConfig, options: Options, bench: Workbench, plan: ComparisonPlan, store: Store
) -> None:
    """Do every open task here, with as many other processes as the options ask for."""
    number, count = options.part
    try:
        with _helpers(config, options, store):
            do_all(bench, plan, store, first=(number - 1) / count, tell=say)
    except KeyboardInterrupt:
        fix = "give the same command again: what is finished is kept"
        raise Interrupted("interrupted", where=str(store.path), fix=fix) from None


def _forget_failures(plan: ComparisonPlan, store: Store) -> None:
    for one in plan.searches:
        for (point, steps), trial in plan.results(one, store).items():
            if trial.reason:
                store.forget(plan.trial(one.contender, point, steps).cached)
        for run in plan.seed_runs(one, store):
            if FAILED in (store.read(run.cached) or {}):
                store.forget(run.cached)


@contextlib.contextmanager
def _helpers(config: RunConfig, options: Options, store: Store) -> Iterator[None]:
    """The other processes of this machine, at work on the same folder while the block runs."""
    context = multiprocessing.get_context("spawn")
    config = replace(config, out=str(store.path))
    workers = [
        context.Process(
            target=_help, args=(config, replace(options, retry=False), number), daemon=True
        )
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


def _help(config: RunConfig, options: Options, number: int) -> None:
    """Work of one more process; its output is the folder."""
    silent = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  lives as long as the process
    with contextlib.suppress(LoratuneError, KeyboardInterrupt), contextlib.redirect_stdout(silent):
        bench, plan, store = prepare(config, options)
        do_all(bench, plan, store, first=number / options.processes)


def assemble(
    config: RunConfig, options: Options, bench: Workbench, plan: ComparisonPlan, store: Store
) -> Comparison:
    """The comparison that the finished tasks make."""
    assembly = Assembly(plan, store, config.compare.target_loss)
    tokenizer = bench.base.tokenizer
    prompts = [
        tokenizer.decode(prompt.prompt_ids, skip_special_tokens=True)
        for prompt in bench.rows.prompts
    ]
    references = [prompt.answer for prompt in bench.rows.prompts]
    comparison = Comparison(
        name=config.name,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        seconds=sum(float(result.get(SECONDS, 0.0)) for result in store.finished()),
        match=options.match,
        steps=bench.steps,
        seeds=list(plan.seeds),
        target_loss=assembly.target_loss,
        base=assembly.base(
            config.model.path, bench.base.fingerprint, bench.architecture.base_parameters
        ),
        rows=bench.rows.summary,
        variants=assembly.variants,
        differences=assembly.differences,
        samples=assembly.samples(prompts, references),
        recipe=redact(run_fields(to_plain(config))),
        provenance=_provenance(bench, options),
    )
    return replace(comparison, findings=verdict(comparison).findings)


def _provenance(bench: Workbench, options: Options) -> dict[str, Any]:
    facts = redact(provenance(str(bench.base.device)))
    return {
        **facts,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": options.processes,
        "dtype": str(bench.base.dtype),
    }


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
