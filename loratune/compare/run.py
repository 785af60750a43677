"""``compare`` from start to end: prepare, do the work, write what came out."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from loratune import files
from loratune.compare import tables
from loratune.compare.assemble import Assembly
from loratune.compare.plan import ComparisonPlan
from loratune.compare.prepare import prepare
from loratune.compare.result import Comparison
from loratune.compare.settings import Options
from loratune.compare.store import MARKDOWN, RESULT, SECONDS
from loratune.compare.verdict import verdict
from loratune.compare.work import do_all
from loratune.compare.workbench import Workbench
from loratune.config.convert import run_fields, to_plain
from loratune.config.schema import RunConfig
from loratune.config.secrets import redact
from loratune.console import say
from loratune.errors import Interrupted, LoratuneError, TrainingError
from loratune.runs.provenance import provenance


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


def share_work(config: RunConfig, options: Options, bench: Workbench, plan: ComparisonPlan) -> None:
    """Do every open task here, with as many other processes as the options ask for."""
    number, count = options.part
    try:
        with _other_processes(replace(config, out=str(plan.store.path)), options):
            do_all(bench, plan, first=(number - 1) / count, tell=say)
    except KeyboardInterrupt:
        fix = "give the same command again: what is finished is kept"
        raise Interrupted("interrupted", where=str(plan.store.path), fix=fix) from None


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
    assembly = Assembly(plan, config.compare, bench.steps(config))
    base, parameters = bench.base, bench.architecture.base_parameters
    comparison = Comparison(
        name=config.name,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        seconds=sum(float(result.get(SECONDS, 0.0)) for result in plan.store.finished()),
        match=options.match,
        steps=bench.steps(config),
        seeds=list(plan.seeds),
        target_loss=assembly.target_loss,
        base=assembly.base(config.model.path, base.fingerprint, parameters),
        rows=bench.rows.summary,
        text_metrics=list(assembly.text_metrics),
        variants=assembly.variants,
        differences=assembly.differences,
        margin=config.compare.margin,
        twins=list(plan.twins),
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
