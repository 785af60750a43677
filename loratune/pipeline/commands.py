"""Stages by their own commands, on an adapter that lies on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from loratune import files
from loratune.adapter_files.peft_format import AdapterFolder, read_adapter
from loratune.adapter_files.tokenizer import own_tokenizer
from loratune.config.mixture import training_paths
from loratune.config.schema import ExportFormat, ModelConfig, RunConfig
from loratune.console import console, say
from loratune.data.bounds import check_positions
from loratune.data.encode import Encoder
from loratune.data.encoded_rows import EncodedRow
from loratune.data.formats import choose_format, parse_question, question_row
from loratune.data.prepare import PreparedData, prepare_data
from loratune.data.reading import read_for, read_rows
from loratune.data.rows import ERRORS_SHOWN, Row, raise_first
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import RowTokenizer
from loratune.errors import ConfigError, LoratuneError, MergeError, refused_as
from loratune.files import BUILTIN
from loratune.generation import Sampling, generate_answers, stop_ids
from loratune.loss.causal_model import LanguageModelHead
from loratune.merging.folder import replaced_tokenizer
from loratune.models.fingerprint import tokenizer_fingerprint
from loratune.models.load import load_tokenizer
from loratune.models.source import model_folder, read_model_config
from loratune.models.vocabulary import tokenizer_and_rows
from loratune.pipeline.later_stages import (
    evaluate_with_retention,
    export_and_show,
    golden_of,
    merge_and_show,
    show_evaluation,
)
from loratune.pipeline.loading import (
    check_base,
    evaluation_only,
    require_prompts,
    retention_rows,
)
from loratune.pipeline.merged_quantized import quantization_of
from loratune.report.scores import task_table
from loratune.runs.golden import Golden, write_golden
from loratune.stages.combine import combine
from loratune.stages.load import BaseModel, load
from loratune.stages.tasks import evaluate_tasks
from loratune.stages.wrap import wrap
from loratune.surgery import WrappedModel, disabled
from loratune.tables import show


@dataclass(frozen=True)
class Tasks:
    """What lm-eval is to measure.

    Attributes:
        names: of its tasks.
        folder: YAML definitions of one's own, if any.
        limit: first documents of each; ``None`` takes all.
    """

    names: Sequence[str]
    folder: Path | None = None
    limit: int | None = None


def evaluate_adapter(
    config: RunConfig,
    folder: Path,
    *,
    base_named: bool,
    own_template: bool,
    out: Path | None,
    as_json: bool,
    golden: Path | None = None,
    tasks: Tasks | None = None,
) -> None:
    """Measure base and adapted model on the recipe's evaluation rows; print and write the scores.

    Args:
        config: the recipe.
        folder: the adapter's.
        base_named: whether ``model`` was chosen, by the user or by a run; see ``base_model``.
        own_template: whether ``data.template`` stands in place of the adapter's.
        out: a file for the scores.
        as_json: whether the scores are printed as JSON.
        golden: a file for golden prompts.
        tasks: lm-eval's tasks, in place of the rows.

    Raises:
        LoratuneError: unusable data, base or adapter, or drift.
    """
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        loaded = load_adapted(config, folder, base_named)
        for file in filter(None, (out, golden)):
            files.check_outside(file, loaded.base.folder, loaded.adapter.path)
        if tasks is not None:
            record = _task_scores(config, loaded, tasks)
        else:
            rows = final_rows_of(config, loaded, own_template=own_template)
            kept = retention_rows(config, loaded.base)
            head, tokenizer = LanguageModelHead(loaded.wrapped.model), loaded.base.tokenizer
            result = evaluate_with_retention(loaded.wrapped, head, tokenizer, rows, kept, config)
            record = result.as_dict()
            show_evaluation(result)
            if golden is not None:
                _write_golden(golden, golden_of(result, loaded.wrapped, tokenizer, rows, config))
    if out is not None:
        files.write_json(out, record)
    if as_json:
        print(files.to_json(record), end="")
    elif out is not None:
        say(f"scores: {out}")


def _write_golden(path: Path, golden: Golden | None) -> None:
    if golden is None:
        raise ConfigError(
            "no prompt could be answered, so there are no golden prompts",
            where=f"golden={path}",
            fix="use rows with prompts, and evaluate.generate=true",
        )
    write_golden(path, golden)
    say(f"golden prompts: {path}")


def _task_scores(config: RunConfig, loaded: LoadedAdapter, tasks: Tasks) -> dict[str, Any]:
    scores = evaluate_tasks(
        loaded.wrapped,
        loaded.base.tokenizer,
        tasks.names,
        tasks.folder,
        batch_size=config.evaluate.batch_size,
        limit=tasks.limit,
        base=config.evaluate.base,
    )
    record = {"tasks": [asdict(score) for score in scores]}
    show(task_table(record["tasks"]))
    return record


def final_rows_of(
    config: RunConfig, loaded: LoadedAdapter, *, own_template: bool = False
) -> PreparedData:
    """The rows of the final evaluation, asked as in training.

    Args:
        config: the recipe.
        loaded: the adapter in its base.
        own_template: whether ``data.template`` stands in place of the adapter's.

    Raises:
        LoratuneError: unusable rows, or none.
    """
    base, adapter = loaded.base, loaded.adapter
    with read_for("data.test_path") if config.data.test_path else nullcontext():
        rows = prepare_data(
            evaluation_only(config.data),
            base.tokenizer,
            base.vocab_size,
            config.trainer.seed,
            prompt_format=None if own_template else prompt_format_of(adapter),
            source_formats=None if own_template else _source_formats(adapter),
        )
    if not rows.eval:
        raise ConfigError(
            "no evaluation rows", where="data.eval_path", fix="set data.eval_path=FILE"
        )
    for line in check_positions(loaded.wrapped.model, rows.eval):
        say(line)
    require_prompts(config, rows)
    return rows


def merge_adapters(
    config: RunConfig, folders: Sequence[Path], out: Path, *, base_named: bool
) -> None:
    """Merge adapters into their base and print the proof.

    Raises:
        LoratuneError: what stands against it; nothing is published then.
    """
    adapters = [_adapter_to_merge(folder) for folder in folders]
    base_folder = _base_folder(adapters[0], config, base_named)
    tokenizer = tokenizer_fingerprint(load_tokenizer(base_folder))
    rows = partial(_rows_of_the_run, adapters[0], base_folder, config)
    merge_and_show(adapters, base_folder, tokenizer, out, config, rows)


def _rows_of_the_run(
    adapter: AdapterFolder, base_folder: Path, config: RunConfig
) -> Sequence[EncodedRow]:
    """The recipe's evaluation rows, or else its training rows; none where it names none."""
    if not (config.data.eval_path or training_paths(config.data)):
        return []
    tokenizer, vocabulary = tokenizer_and_rows(base_folder, config.model.add_tokens)
    data = prepare_data(
        evaluation_only(config.data),
        tokenizer,
        vocabulary,
        config.trainer.seed,
        prompt_format=prompt_format_of(adapter),
        source_formats=_source_formats(adapter),
    )
    return data.eval or data.train


def export_adapter(
    config: RunConfig, folder: Path, out: Path, form: ExportFormat, *, base_named: bool
) -> None:
    """Export an adapter in another form and print what was proved.

    Raises:
        LoratuneError: what stands against it; nothing is published then.
    """
    if form is ExportFormat.merged:
        merge_adapters(config, [folder], out, base_named=base_named)
        return
    adapter = _adapter_to_merge(folder)
    export_and_show(adapter, _base_folder(adapter, config, base_named), out, form, config)


def combine_adapters(
    config: RunConfig,
    folders: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    *,
    base_named: bool,
) -> None:
    """Write the weighted sum of adapters as one, and print what was proved.

    Raises:
        LoratuneError: what stands against it; nothing is published then.
    """
    adapters = [_adapter_to_merge(folder) for folder in folders]
    base_folder = _base_folder(adapters[0], config, base_named)
    tokenizer = tokenizer_fingerprint(load_tokenizer(base_folder))
    certificate = combine(
        adapters, weights, base_folder, out, tokenizer=tokenizer, allow_drift=config.allow_drift
    )
    proof = certificate["proof"]
    terms = " + ".join(f"{w:g} · {folder}" for w, folder in zip(weights, folders, strict=True))
    say(
        f"combined {terms}: rank {certificate['rank']}, ΔW differs from the sum by "
        f"{proof['worst_relative_difference']:.1e} of its largest term at most: {out}"
    )


def generate(
    config: RunConfig,
    folder: Path,
    *,
    base_named: bool,
    prompt: str | None,
    prompts: str | None,
    system: str | None,
    sampling: Sampling,
    with_base: bool,
) -> None:
    """Answer a prompt or a file of rows; one JSON object per line on standard output.

    Args:
        config: the recipe.
        folder: the adapter's.
        base_named: whether ``model`` was chosen, by the user or by a run; see ``base_model``.
        prompt: one prompt; or else
        prompts: a file of rows.
        system: a system text for ``prompt``.
        sampling: how answers are drawn.
        with_base: whether the base model answers as well.

    Raises:
        LoratuneError: unusable rows, base or adapter, or drift.
    """
    with redirect_stdout(sys.stderr):  # answers alone go to standard output
        adapter, base, wrapped = load_adapted(config, folder, base_named)
    tokenizer = RowTokenizer(base.tokenizer)
    prompt_format = prompt_format_of(adapter)
    rows = (
        read_rows(str(prompts), key="prompts")
        if prompt is None
        else [question_row(prompt, system, prompt_format)]
    )
    prompt_format = prompt_format or choose_format(config.data, rows)
    ids = _prompt_ids(rows, Encoder(tokenizer, prompt_format, config.data), prompt_format)
    model, pad_id = wrapped.model, tokenizer.pad_id
    stops = stop_ids(model, base.tokenizer, prompt_format)
    adapted = generate_answers(model, base.tokenizer, ids, sampling, pad_id, stops)
    before: Sequence[str | None] = [None] * len(ids)
    if with_base:
        with disabled(wrapped):
            before = generate_answers(model, base.tokenizer, ids, sampling, pad_id, stops)
    asked = [prompt] if prompt is not None else [dict(row.columns) for row in rows]
    for question, old, new in zip(asked, before, adapted, strict=True):
        record: dict[str, Any] = {"prompt": question, "adapted": new}
        if old is not None:
            record["base"] = old
        print(json.dumps(record, ensure_ascii=not console().is_terminal))


# -- adapter and base ----------------------------------------------------------------------


def base_model(adapter: AdapterFolder, model: ModelConfig, *, named: bool) -> ModelConfig:
    """The adapter's base: ``model`` where the user or a run named it, else what the adapter says.

    An adapter's own word is taken only for an embedded model or a folder beside which it lies;
    a hub id in it is never fetched unasked.

    Raises:
        ConfigError: if nobody says.
    """
    model = _quantized_alike(adapter, model)
    if named:
        return model
    recorded = str(adapter.facts.get("base_path") or "")
    is_folder = Path(recorded).is_absolute()
    if recorded.startswith(BUILTIN) or is_folder or (recorded and Path(recorded).is_dir()):
        return replace(model, path=recorded)
    hint = str(adapter.peft.get("base_model_name_or_path") or "")
    raise ConfigError(
        "which base model?",
        where=str(adapter.path),
        fix=f"set model.path=DIR{f' (the adapter names {hint!r})' if hint else ''}",
    )


def _quantized_alike(adapter: AdapterFolder, model: ModelConfig) -> ModelConfig:
    """The settings with which the base was quantized that the adapter was trained on."""
    quantization = quantization_of(adapter)
    if quantization is None or quantization.in_files or model.quantize is not None:
        return model
    return replace(
        model,
        quantize=quantization.kind,
        quantize_double=quantization.double,
        quantize_skip=list(quantization.skip),
    )


def _base_folder(adapter: AdapterFolder, config: RunConfig, base_named: bool) -> Path:
    model = base_model(adapter, config.model, named=base_named)
    folder = model_folder(model.path, model.revision)
    read_model_config(folder)  # says what a folder is that holds no model
    return folder


class LoadedAdapter(NamedTuple):
    """An adapter in its base, in eval mode."""

    adapter: AdapterFolder
    base: BaseModel
    wrapped: WrappedModel


def load_adapted(config: RunConfig, folder: Path, base_named: bool) -> LoadedAdapter:
    """An adapter's folder, its base, and the base with the adapter in it.

    Raises:
        LoratuneError: unusable base or adapter, or drift.
    """
    adapter = read_adapter(folder)
    model = base_model(adapter, config.model, named=base_named)
    base = load(replace(model, add_tokens=[]), config.trainer.precision)  # the adapter's own come
    check_base(base, adapter, config.allow_drift)
    rows = base.vocab_size
    wrapped = wrap(base.model, config, adapter)
    wrapped.model.eval()
    own, note = own_tokenizer(adapter, base.vocab_size, resized=base.vocab_size != rows)
    if own is not None:
        base.tokenizer = replaced_tokenizer(base.folder, own)
    for line in (*wrapped.match.notices, *([note] if note else [])):
        say(f"note: {line}")
    return LoadedAdapter(adapter, base, wrapped)


def _adapter_to_merge(folder: Path) -> AdapterFolder:
    """An adapter whose every fault is one of the merge that it would spoil."""
    with refused_as(MergeError):
        return read_adapter(folder)


# -- prompts -------------------------------------------------------------------------------


def prompt_format_of(adapter: AdapterFolder) -> PromptFormat | None:
    """How prompts were written in training, where the adapter says it."""
    recorded = adapter.facts.get("prompt_format")
    return PromptFormat.from_dict(recorded) if recorded else None


def _source_formats(adapter: AdapterFolder) -> dict[str, PromptFormat]:
    """The same of every source of the mixture that it was trained on."""
    recorded = adapter.facts.get("source_formats") or {}
    return {name: PromptFormat.from_dict(values) for name, values in recorded.items()}


def _prompt_ids(
    rows: Sequence[Row], encoder: Encoder, prompt_format: PromptFormat
) -> list[list[int]]:
    """The ids of what each row asks: read, checked and written exactly as in training.

    Raises:
        LoratuneError: one line ``file:line`` for each row that cannot be asked.
    """
    prompts: list[list[int]] = []
    problems: list[LoratuneError] = []
    for row in rows:
        try:
            prompts.append(encoder.prompt_ids(parse_question(row, prompt_format)))
        except LoratuneError as problem:
            if not problem.where.startswith(row.source):
                problem.where = ", ".join(filter(None, (row.source, problem.where)))
            problems.append(problem)
    raise_first(problems[:ERRORS_SHOWN], total=len(problems))
    return prompts
