"""One run: load, wrap, train, evaluate, merge, export, in this order."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loratune import files
from loratune.adapter_files.continuing import adapter_to_continue
from loratune.adapter_files.peft_format import (
    AdapterFolder,
    read_adapter,
    shared_fingerprint,
    write_adapter,
)
from loratune.config.convert import to_plain
from loratune.config.schema import ExportFormat, RunConfig, Stage
from loratune.config.secrets import redact
from loratune.console import say
from loratune.counting.parameters import ParameterReport
from loratune.counting.tables import to_rich, variant_grid
from loratune.counting.variant_report import report_variants
from loratune.data.audit import audit
from loratune.data.batches import BatchPlan
from loratune.data.prepare import PreparedData, prepare_data
from loratune.files import BUILTIN
from loratune.loss import LanguageModelHead
from loratune.models.load import load_tokenizer
from loratune.models.measure import measure_model
from loratune.models.source import model_folder, read_model_config
from loratune.pipeline.tables import evaluation_table, merge_lines, sample_table, show
from loratune.report.build import finished_report
from loratune.runs import processes
from loratune.runs.checkpoint import Checkpoint
from loratune.runs.drift import fact_changes, refuse
from loratune.runs.provenance import package_versions, provenance
from loratune.runs.resume import (
    AUTO,
    check_resume,
    find_checkpoint,
    is_complete,
    refuse_drift,
    resumed_run_folder,
)
from loratune.runs.run_dir import RunDir, recipe_record, write_summary
from loratune.stages.evaluate import Evaluation, evaluate, evaluation_loss
from loratune.stages.export import export
from loratune.stages.load import BaseModel, load
from loratune.stages.merge import MergeReport, merge
from loratune.stages.train import Evaluate, TrainingSet, TrainResult, train
from loratune.stages.wrap import wrap, wrap_existing
from loratune.surgery import WrappedModel
from loratune.training.advice import Setup, summary_lines
from loratune.training.compiling import compile_errors
from loratune.training.forward import checkpoint_activations
from loratune.training.guards import refuse_nothing_trainable
from loratune.training.history import History
from loratune.training.memory import memory_errors
from loratune.training.optim import describe_groups, learning_rate, make_optimizer
from loratune.training.record import Tracker
from loratune.training.sharding import shard_base
from loratune.training.signals import StopAtOnce
from loratune.training.state import seed_everything
from loratune.training.trackers import check_trackers, open_trackers

_SMALLER = "lower evaluate.batch_size or data.max_length, or set model.dtype=bfloat16"


@dataclass(frozen=True)
class RunSummary:
    """What a run came to.

    Attributes:
        path: its folder.
        parameters: the parameter report of all variants.
        training: steps and losses, if it trained.
        evaluation: base and adapted scores, if it evaluated.
        merge: the merge's proof, if it merged.
    """

    path: Path
    parameters: ParameterReport
    training: TrainResult | None = None
    evaluation: Evaluation | None = None
    merge: MergeReport | None = None


def run(config: RunConfig) -> RunSummary | None:
    """Run a recipe's stages in its own folder; ``None`` if they were complete already.

    Raises:
        LoratuneError: whatever stopped it; what was published stays whole.
    """
    check_resume(config)
    check_trackers(config.trackers)
    if config.resume not in (None, AUTO):
        config.out = str(resumed_run_folder(str(config.resume)))
    if config.resume and config.out and is_complete(config, RunDir(Path(config.out))):
        if processes.is_main():
            _tidy_complete(RunDir(Path(config.out)))
        return None
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)

    def size() -> str:
        return f"model {config.model.path}, rows of up to {config.data.max_length} tokens"

    with _run_folder(config) as run_dir, memory_errors(size, _SMALLER):
        return _Run(config, run_dir).stages()


def _tidy_complete(run_dir: RunDir) -> None:
    """A complete run is left as it is, unless it was killed while its report was written."""
    if files.leftovers(run_dir.path) or not run_dir.report.exists():
        run_dir.hold()
        files.remove_leftovers(run_dir.path)
        finished_report(run_dir.path)
        run_dir.release()
    say(f"already complete: {run_dir.path}")


@contextmanager
def _run_folder(config: RunConfig) -> Iterator[RunDir]:
    """The run's folder, held; removed again if nothing got as far as a recipe in it."""
    run_dir = RunDir.create(config) if processes.is_main() else None
    path = processes.broadcast(str(run_dir.path) if run_dir else None)
    try:
        yield run_dir or RunDir(Path(path))
    except BaseException:
        if run_dir and set(run_dir.path.iterdir()) <= {run_dir.lock}:
            shutil.rmtree(run_dir.path, ignore_errors=True)
        raise
    finally:
        if run_dir:
            run_dir.release()


class _Run:
    """The stages of one run, sharing what earlier ones made."""

    def __init__(self, config: RunConfig, run_dir: RunDir) -> None:
        self.config, self.run_dir = config, run_dir
        self.checkpoint: Checkpoint | None = find_checkpoint(config, run_dir)
        self.continued = adapter_to_continue(config)
        self.data, self.base = self._data_and_base()
        self.architecture = measure_model(self.base.model)
        self.wrapped = self._wrap()
        self.report = report_variants(self.architecture, self.wrapped)
        self.facts = self._facts()
        self.head = LanguageModelHead(self.wrapped.model)

    def stages(self) -> RunSummary:
        """Run what the recipe names and record it."""
        stages, main = self.config.stages, processes.is_main()
        if self.checkpoint is not None:
            self._say(f"resuming after step {self.checkpoint.step}")
            self.facts["drift"] = [
                *self.checkpoint.facts.get("drift", []),
                *refuse_drift(self.checkpoint, self.facts, self.config),
            ]
        if main:
            self._write_records()
        training = self._train() if Stage.train in stages else None
        if main:
            self._publish_adapter(training)
        with StopAtOnce(training.steps if training else 0, self.run_dir.path):
            return self._later_stages(training)

    def _later_stages(self, training: TrainResult | None) -> RunSummary:
        """What comes after the adapter is published, and cannot harm it."""
        stages, main = self.config.stages, processes.is_main()
        measured = self.data.eval or self.config.data.test_path
        evaluation = self._evaluate() if Stage.evaluate in stages and measured else None
        merged = None
        if main:
            adapter = read_adapter(self.run_dir.adapter)
            merged = self._merge(adapter) if Stage.merge in stages else None
            if Stage.export in stages:
                self._export(adapter)
        summary = RunSummary(self.run_dir.path, self.report, training, evaluation, merged)
        if main:
            self._finish(summary)
        return summary

    # -- load and wrap ---------------------------------------------------------------------

    def _data_and_base(self) -> tuple[PreparedData, BaseModel]:
        """Data first: a bad row is found before any weight is read."""
        config = self.config
        folder = model_folder(config.model.path, config.model.revision)
        numbers = read_model_config(folder)
        tokenizer = load_tokenizer(folder)
        vocabulary = int(numbers.get("vocab_size") or len(tokenizer))
        data = prepare_data(config.data, tokenizer, vocabulary, config.trainer.seed)
        for line in data.report.lines():
            self._say(line)
        self._audit(data, tokenizer)
        self._say(f"base {config.model.path}")
        base = load(config.model, config.trainer.precision, tokenizer)
        return data, base

    def _audit(self, data: PreparedData, tokenizer: Any) -> None:
        """Say what is doubtful about the rows; stop at what would teach the wrong thing."""
        if Stage.train not in self.config.stages:
            return
        found = audit(data, tokenizer, self.config.data)
        found.raise_errors()
        for finding in found.findings:
            self._say(finding.line)

    def _wrap(self) -> WrappedModel:
        config = self.config
        if self.continued is None:
            wrapped = wrap(self.base.model, config.adapter, config.targets, config.trainer.seed)
        else:
            wrapped, _ = wrap_existing(self.base.model, self.continued)
        self.continued_drift = self._check_continued()
        for pattern, count in wrapped.match.counts.items():
            self._say(f"target {pattern}: {count} layers")
        for line in [*wrapped.match.notices, *wrapped.config.warnings()]:
            self._say(f"note: {line}")
        return wrapped

    def _check_continued(self) -> list[str]:
        if self.continued is None:
            return []
        facts = {"base": self.base.fingerprint, "tokenizer": self.base.tokenizer_fingerprint}
        changes = fact_changes(self.continued.facts, facts, ("base", "tokenizer"))
        return refuse(changes, self.config.allow_drift, where=str(self.continued.path))

    def _facts(self) -> dict[str, Any]:
        """What checkpoints and adapters record about what this run is made of."""
        return {
            "recipe": recipe_record(self.config),
            "base": self.base.fingerprint,
            "tokenizer": self.base.tokenizer_fingerprint,
            "data": self.data.fingerprint,
            "projection": shared_fingerprint(self.wrapped),
            "processes": processes.world_size(),
            "versions": package_versions(),
            "drift": self.continued_drift,
        }

    def _write_records(self) -> None:
        self.run_dir.summary.unlink(missing_ok=True)  # a finished run that goes on is not finished
        self.run_dir.write_recipe(self.config)
        records = redact(provenance(str(self.base.device)))
        fingerprints = {key: self.facts[key] for key in ("base", "tokenizer", "data", "projection")}
        records |= {"fingerprints": fingerprints, "dtype": str(self.base.dtype)}
        files.write_json(self.run_dir.provenance, records)
        files.write_json(self.run_dir.parameters, self.report.to_dict())
        files.write_json(self.run_dir.data, self.data.report.to_dict())
        show(to_rich(variant_grid(self.report)))

    # -- train -----------------------------------------------------------------------------

    def _train(self) -> TrainResult:
        config, data = self.config, self.data
        refuse_nothing_trainable(self.wrapped.model)
        plan = BatchPlan.from_config([len(row) for row in data.train], config.data, config.trainer)
        rows = TrainingSet(
            data.train, plan, data.pad_id, config.data.packing, config.data.max_length
        )
        if config.trainer.gradient_checkpointing:
            checkpoint_activations(self.wrapped.model)
        if config.launch.shard:
            shard_base(self.wrapped.model)
        seed_everything(config.trainer.seed)
        self._describe_plan(plan)
        with compile_errors():
            if config.trainer.compile:
                self.head.compile_backbone()
            result = train(
                self.wrapped,
                self.head,
                rows,
                config.trainer,
                self.run_dir,
                facts=self.facts,
                checkpoint=self.checkpoint,
                evaluate=self._evaluation_closure(),
                trackers=self._trackers(),
            )
        loss = "" if result.loss is None else f", loss {result.loss:.4f}"
        self._say(f"trained {result.steps} steps in {result.seconds:.1f} s{loss}")
        history = History.read(self.run_dir.metrics, self.run_dir.timings)
        for line in summary_lines(history, Setup.of(to_plain(config))):
            self._say(line)
        return result

    def _trackers(self) -> list[Tracker]:
        if not processes.is_main():
            return []
        step = self.checkpoint.step if self.checkpoint else 0
        return open_trackers(self.config, self.run_dir, step)

    def _describe_plan(self, plan: BatchPlan) -> None:
        trainer = self.config.trainer
        epochs = plan.total_steps / plan.steps_per_epoch
        self._say(
            f"{plan.total_steps} steps of {trainer.batch_size} × {trainer.grad_accum_steps} rows "
            f"= {epochs:.2f} passes over {len(self.data.train):,} rows; "
            f"lr {learning_rate(trainer, self.wrapped.config):g}, "
            f"{self.base.dtype}, {self.base.device}"
        )
        groups = describe_groups(make_optimizer(self.wrapped.model, self.wrapped.config, trainer))
        if len(groups) > 1:
            for group in groups:
                self._say(
                    f"  group {group['name']}: {group['parameters']:,} parameters, "
                    f"lr {group['lr']:g}, decay {group['weight_decay']:g}"
                )

    def _evaluation_closure(self) -> Evaluate | None:
        if not self.data.eval or not self.config.trainer.eval_every:
            return None

        def measure() -> dict[str, float]:
            loss, accuracy, _ = evaluation_loss(
                self.head, self.data.eval, self.data.pad_id, self.config.evaluate.batch_size
            )
            return {"eval/loss": loss, "eval/token_accuracy": accuracy}

        return measure

    def _publish_adapter(self, training: TrainResult | None) -> None:
        facts = {
            **{
                key: self.facts[key] for key in ("base", "tokenizer", "data", "projection", "drift")
            },
            "variant": self.wrapped.config.variant,
            "adapter": to_plain_adapter(self.wrapped),
            "base_path": self.config.model.path,
            "prompt_format": self.data.prompt_format.to_dict(),
            "seed": self.config.trainer.seed if self.continued is None else None,
            "step": training.best_step if training else None,
            "versions": self.facts["versions"],
        }
        with files.published_folder(self.run_dir.adapter, replace=True) as target:
            write_adapter(target, self.wrapped, facts, self.config.model.path)
        self._say(f"adapter saved: {self.run_dir.adapter}")

    # -- evaluate, merge, export -----------------------------------------------------------

    def _evaluate(self) -> Evaluation:
        rows = final_rows(self.config, self.data, self.base)
        result = evaluate(self.wrapped, self.head, self.base.tokenizer, rows, self.config.evaluate)
        if processes.is_main():
            files.write_json(self.run_dir.evaluation, result.as_dict())
            show(evaluation_table(result))
            if result.samples:
                show(sample_table(result.samples))
        return result

    def _merge(self, adapter: AdapterFolder) -> MergeReport:
        files.discard_folder(self.run_dir.merged)  # what a killed start merged is made again
        report = merge(
            [adapter],
            self.base.folder,
            self.run_dir.merged,
            self.config.merge,
            tokenizer=self.base.tokenizer_fingerprint,
            allow_drift=self.config.allow_drift,
        )
        for line in merge_lines(report):
            self._say(line)
        return report

    def _export(self, adapter: AdapterFolder) -> None:
        form = self.config.export.format
        if form is ExportFormat.merged:
            if not self.run_dir.merged.exists():
                self._merge(adapter)
            return
        files.discard_folder(self.run_dir.export)
        export(adapter, self.base.folder, self.run_dir.export, form, self.config.merge.verify)
        self._say(f"exported {form}: {self.run_dir.export}")

    def _finish(self, summary: RunSummary) -> None:
        record = {
            "training": asdict(summary.training) if summary.training else None,
            "stages": [str(stage) for stage in self.config.stages],
        }
        write_summary(self.run_dir.path, record)
        self.run_dir.link_latest(self.config.name)
        self._say(f"everything lies in {self.run_dir.path}")
        self._say(f"report: {finished_report(self.run_dir.path)}")

    def _say(self, line: str) -> None:
        if processes.is_main():
            say(line)


def to_plain_adapter(wrapped: WrappedModel) -> dict[str, Any]:
    """The variant's settings as plain values."""
    plain = to_plain(wrapped.config)
    return {key: value for key, value in plain.items() if key != "variant"}


def final_rows(config: RunConfig, data: PreparedData, base: BaseModel) -> PreparedData:
    """The rows of the final evaluation: those that chose nothing, where the recipe names any."""
    if config.data.test_path is None or _is_demos_alone(config.data.test_path, config):
        return data
    test = replace(config.data, path=None, eval_path=config.data.test_path, test_path=None)
    return prepare_data(
        test, base.tokenizer, base.vocab_size, config.trainer.seed, prompt_format=data.prompt_format
    )


def _is_demos_alone(path: str, config: RunConfig) -> bool:
    """Whether the test rows are the embedded demo's although the training rows are the user's."""
    stranger = path.startswith(BUILTIN) and not str(config.data.path).startswith(BUILTIN)
    if stranger and processes.is_main():
        say(
            f"note: data.test_path={path} belongs to the demo; the evaluation rows are used instead"
        )
    return stranger
