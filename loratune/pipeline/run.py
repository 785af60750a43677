"""One run: load, wrap, train, evaluate, merge, export, in this order."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from loratune import files
from loratune.adapter_files.peft_format import read_adapter
from loratune.config.schema import ExportFormat, RunConfig, Stage
from loratune.console import say
from loratune.loss.causal_model import LanguageModelHead
from loratune.models.source import recorded_path
from loratune.pipeline.continuing import with_own_structure
from loratune.pipeline.later_stages import evaluate_and_show, export_and_show, merge_and_show
from loratune.pipeline.loading import (
    adapter_to_continue,
    final_rows,
    load_data_and_base,
    retention_rows,
    wrap_base,
)
from loratune.pipeline.records import Records, run_facts, started_with
from loratune.pipeline.training import train_adapter
from loratune.report.build import finished_report
from loratune.runs import processes
from loratune.runs.agreement import check_agreement, check_enough_rows, check_shared
from loratune.runs.resume import find_checkpoint, is_complete, recorded_clock, resumed_facts
from loratune.runs.run_dir import RunDir, with_run_folder
from loratune.training.sharding import drop_gathered
from loratune.training.signals import stop_at_once
from loratune.training.torch_errors import memory_errors
from loratune.training.trackers import check_trackers

_LESS_MEMORY = "lower evaluate.batch_size or data.max_length, or set model.dtype=bfloat16"


def run(config: RunConfig) -> None:
    """Run a recipe's stages in its own folder, unless they are complete already.

    Raises:
        LoratuneError: whatever stopped it; what was published stays whole.
    """
    config = _as_recorded(with_run_folder(config))
    check_trackers(config.trackers)
    if processes.broadcast(is_complete(config) if processes.is_main() else None):
        _leave_complete(RunDir(Path(str(config.out))))
        return
    with _run_folder(config) as run_dir:
        checkpoint, saved = find_checkpoint(config, run_dir), adapter_to_continue(config)
        data, base = load_data_and_base(config, recorded_clock(checkpoint))
        wrapped, parameters, drift = wrap_base(base, config, saved)
        head = LanguageModelHead(wrapped.model, router_loss=config.trainer.router_loss)
        drop_gathered(wrapped.model)  # the head was looked for with a forward pass

        final = final_rows(config, data, base)
        kept = retention_rows(config, base) if Stage.evaluate in config.stages else {}
        facts = run_facts(config, base, data, wrapped, drift)
        check_agreement({**facts, **started_with(wrapped, saved, final)})
        if Stage.train in config.stages:
            check_enough_rows(len(data.train), config.trainer.batch_size)
        records = Records(config, run_dir, resumed_facts(checkpoint, facts, config))
        records.begin(base, data, parameters)

        training = None
        if Stage.train in config.stages:
            training = train_adapter(records, data, wrapped, head, checkpoint)
        records.publish_adapter(wrapped, data, base.tokenizer, training)

        with stop_at_once(training.steps if training else 0, run_dir.path):
            if Stage.evaluate in config.stages:
                outs = run_dir.evaluation, run_dir.golden
                evaluate_and_show(wrapped, head, base.tokenizer, final, kept, config, *outs)
            if not processes.is_main():
                return  # what follows works on files
            adapter, own = read_adapter(run_dir.adapter), base.tokenizer_fingerprint
            if _merges(config):
                files.discard_folder(run_dir.merged)  # what a killed start left
                rows = final.eval or data.train
                merge_and_show([adapter], base.folder, own, run_dir.merged, config, lambda: rows)
            if _exports(config):
                files.discard_folder(run_dir.export)
                export_and_show(adapter, base.folder, run_dir.export, config.export.format, config)
            records.finish(training)


def _as_recorded(config: RunConfig) -> RunConfig:
    """The recipe as it is trained and recorded: the base's whole path, a continued adapter's rank.

    Raises:
        LoratuneError: if the adapter to continue cannot be read.
    """
    model = replace(config.model, path=recorded_path(config.model.path))
    return with_own_structure(replace(config, model=model))


def _merges(config: RunConfig) -> bool:
    """Whether there is a merged model in the end."""
    exports_merged = Stage.export in config.stages and config.export.format is ExportFormat.merged
    return Stage.merge in config.stages or exports_merged


def _exports(config: RunConfig) -> bool:
    """Whether there is an export in the end that is not the merged model."""
    return Stage.export in config.stages and config.export.format is not ExportFormat.merged


def _leave_complete(run_dir: RunDir) -> None:
    """A complete run stays as it is, unless it was killed while its report was written."""
    if not processes.is_main():
        return
    if files.leftovers(run_dir.path) or not run_dir.report.exists():
        run_dir.hold()
        files.remove_leftovers(run_dir.path)
        finished_report(run_dir.path)
        run_dir.release()
    say(f"already complete: {run_dir.path}")


@contextmanager
def _run_folder(config: RunConfig) -> Iterator[RunDir]:
    """The run's folder, held; removed again if nothing got as far as a recipe in it.

    Inside the block ``trainer.threads`` holds, and running out of memory is explained.
    """

    def size() -> str:
        return f"model {config.model.path}, rows of up to {config.data.max_length} tokens"

    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    # Of several processes, one may have been lost that is still saving where the others go on.
    waits = config.resume is not None and processes.world_size() > 1
    patience = config.launch.timeout / 2 if waits else 0
    run_dir = RunDir.create(config, patience) if processes.is_main() else None
    path = processes.broadcast(str(run_dir.path) if run_dir else None)
    try:
        run_dir_here = run_dir or RunDir(Path(path))
        check_shared(run_dir_here.path, run_dir_here.lock, config.launch.timeout / 2)
        with memory_errors(size, _LESS_MEMORY):
            yield run_dir_here
    except BaseException:
        if run_dir and set(run_dir.path.iterdir()) <= {run_dir.lock}:
            shutil.rmtree(run_dir.path, ignore_errors=True)
        raise
    finally:
        if run_dir:
            run_dir.release()
