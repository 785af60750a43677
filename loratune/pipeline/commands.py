"""Stages by their own commands, on an adapter that lies on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune import files
from loratune.adapter_files.peft_format import AdapterFolder, read_adapter
from loratune.config.schema import ExportFormat, ModelConfig, RunConfig
from loratune.console import console, say
from loratune.data.encode import Encoder
from loratune.data.formats import choose_format
from loratune.data.prepare import prepare_data
from loratune.data.reading import read_rows
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import RowTokenizer
from loratune.errors import CheckpointError, ConfigError, MergeError, refused_as
from loratune.files import BUILTIN
from loratune.generation import Sampling, generate_answers
from loratune.loss.causal_model import LanguageModelHead
from loratune.models.fingerprint import tokenizer_fingerprint
from loratune.models.load import load_tokenizer
from loratune.models.source import model_folder
from loratune.pipeline.tables import evaluation_table, merge_lines, sample_table, show
from loratune.runs.drift import fact_changes, refuse
from loratune.stages.evaluate import evaluate
from loratune.stages.export import export
from loratune.stages.load import BaseModel, load
from loratune.stages.merge import merge
from loratune.stages.wrap import wrap_existing
from loratune.surgery import WrappedModel, disabled

if TYPE_CHECKING:
    from loratune.cli.commands.evaluate import Config as EvaluateCommand
    from loratune.cli.commands.generate import Config as GenerateCommand


def base_of(adapter: AdapterFolder, model: ModelConfig, given: set[str], run: str | None) -> str:
    """Where the adapter's base is: the command line's word, the run's, or the adapter's own.

    An adapter's own word is taken only for an embedded model or a folder beside which it lies;
    a hub id in it is never fetched unasked.

    Raises:
        ConfigError: if nobody says.
    """
    if run is not None or given & {"model", "model.path", "recipe"}:
        return model.path
    recorded = str(adapter.facts.get("base_path") or "")
    if recorded.startswith(BUILTIN) or (recorded and Path(recorded).is_dir()):
        return recorded
    named = str(adapter.peft.get("base_model_name_or_path") or "")
    raise ConfigError(
        "which base model?",
        where=str(adapter.path),
        fix=f"set model.path=DIR{f' (the adapter names {named!r})' if named else ''}",
    )


def _base_folder(
    adapter: AdapterFolder, config: RunConfig, given: set[str], run: str | None
) -> Path:
    config.model.path = base_of(adapter, config.model, given, run)
    return model_folder(config.model.path, config.model.revision)


def _adapted(
    config: RunConfig, folder: Path, given: set[str], run: str | None
) -> tuple[BaseModel, WrappedModel, AdapterFolder]:
    adapter = read_adapter(folder)
    _base_folder(adapter, config, given, run)
    base = load(config.model, config.trainer.precision)
    facts = {"base": base.fingerprint, "tokenizer": base.tokenizer_fingerprint}
    _check_binding(adapter, facts, config.allow_drift)
    wrapped, adapter = wrap_existing(base.model, adapter)
    wrapped.model.eval()
    return base, wrapped, adapter


def _check_binding(adapter: AdapterFolder, facts: dict[str, str], allowed: Sequence[str]) -> None:
    if "base" not in adapter.facts:
        say("note: this adapter does not say which base it was trained on")
    changes = fact_changes(adapter.facts, facts, ("base", "tokenizer"))
    for line in refuse(changes, allowed, where=str(adapter.path), error=CheckpointError):
        say(f"drift allowed: {line}")


def evaluate_adapter(config: EvaluateCommand, folder: Path, given: set[str]) -> None:
    """Measure base and adapted model on the recipe's evaluation rows; print, and keep with a run.

    Raises:
        LoratuneError: unusable data, base or adapter, or drift.
    """
    base, wrapped, adapter = _adapted(config, folder, given, config.run)
    data_config = config.data
    data_config.eval_path = data_config.test_path or data_config.eval_path
    if data_config.eval_path is not None:
        data_config.path = None
    kept = adapter.facts.get("prompt_format")
    prompt_format = PromptFormat.from_dict(kept) if kept and "data.template" not in given else None
    data = prepare_data(
        data_config,
        base.tokenizer,
        base.vocab_size,
        config.trainer.seed,
        prompt_format=prompt_format,
    )
    if not data.eval:
        raise ConfigError(
            "no evaluation rows", where="data.eval_path", fix="set data.eval_path=FILE"
        )
    head = LanguageModelHead(wrapped.model)
    result = evaluate(wrapped, head, base.tokenizer, data, config.evaluate)
    if config.format == "json":
        print(files.to_json(result.as_dict()), end="")
        return
    show(evaluation_table(result))
    if result.samples:
        show(sample_table(result.samples))
    if config.out is not None and config.run is None:
        files.write_json(Path(config.out), result.as_dict())


def merge_adapters(
    config: RunConfig, folders: Sequence[Path], target: Path, given: set[str]
) -> None:
    """Merge adapters into their base and print the proof.

    Raises:
        LoratuneError: what stands against it; nothing is published then.
    """
    adapters = [_adapter_to_merge(folder) for folder in folders]
    base_folder = _base_folder(adapters[0], config, given, getattr(config, "run", None))
    report = merge(
        adapters,
        base_folder,
        target,
        config.merge,
        tokenizer=tokenizer_fingerprint(load_tokenizer(base_folder)),
        allow_drift=config.allow_drift,
    )
    for line in merge_lines(report):
        say(line)
    say(f"merged model: {target}")


def _adapter_to_merge(folder: Path) -> AdapterFolder:
    """An adapter whose every fault is one of the merge that it would spoil."""
    with refused_as(MergeError):
        return read_adapter(folder)


def export_adapter(
    config: RunConfig, folder: Path, target: Path, form: ExportFormat, given: set[str]
) -> None:
    """Export an adapter in another form and say what was proved.

    Raises:
        LoratuneError: what stands against it; nothing is published then.
    """
    if form is ExportFormat.merged:
        merge_adapters(config, [folder], target, given)
        return
    adapter = _adapter_to_merge(folder)
    base_folder = _base_folder(adapter, config, given, getattr(config, "run", None))
    certificate = export(adapter, base_folder, target, form, config.merge.verify)
    worst, logits = (certificate["proof"][key] for key in ("worst_relative_difference", "logits"))
    proved = f"ΔW differs from the original's by {worst:.1e} at most"
    if logits is not None:
        proved += f", logits by {logits['max_difference']:.1e} on {logits['tokens']} tokens"
    say(f"exported {form}: {target} ({proved})")


def generate(config: GenerateCommand, folder: Path, given: set[str]) -> None:
    """Answer a prompt or a file of rows; one JSON object per line on standard output.

    Raises:
        LoratuneError: unusable rows, base or adapter, or drift.
    """
    base, wrapped, adapter = _adapted(config, folder, given, config.run)
    questions, ids = _questions(config, adapter, base.tokenizer)
    pad_id = RowTokenizer(base.tokenizer).pad_id
    sampling = Sampling(
        config.max_new_tokens,
        config.temperature,
        config.top_p,
        config.evaluate.batch_size,
        config.seed,
    )
    adapted = generate_answers(wrapped.model, base.tokenizer, ids, sampling, pad_id)
    before: list[str | None] = [None] * len(ids)
    if config.base:
        with disabled(wrapped):
            before = [*generate_answers(wrapped.model, base.tokenizer, ids, sampling, pad_id)]
    for question, old, new in zip(questions, before, adapted, strict=True):
        record: dict[str, Any] = {"prompt": question, "adapted": new}
        if old is not None:
            record["base"] = old
        print(json.dumps(record, ensure_ascii=not console().is_terminal))


def _questions(
    config: GenerateCommand, adapter: AdapterFolder, tokenizer: Any
) -> tuple[list[Any], list[list[int]]]:
    """What is asked, and its ids, written exactly as in training."""
    kept = adapter.facts.get("prompt_format")
    if config.prompt is not None:
        prompt_format = PromptFormat.from_dict(kept) if kept else None
        encoder = Encoder(RowTokenizer(tokenizer), prompt_format or _plain_format(config))
        return [config.prompt], [encoder.prompt_ids({"prompt": config.prompt})]
    rows = read_rows(str(config.prompts))
    prompt_format = PromptFormat.from_dict(kept) if kept else choose_format(config.data, rows)
    encoder = Encoder(RowTokenizer(tokenizer), prompt_format)
    ids = [encoder.prompt_ids(row.columns, row.source) for row in rows]
    return [dict(row.columns) for row in rows], ids


def _plain_format(config: GenerateCommand) -> PromptFormat:
    from loratune.data.rows import Row

    row = Row({"prompt": config.prompt, "completion": "-"}, "prompt")
    return choose_format(config.data, [row])
