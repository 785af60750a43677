"""Load and wrap: rows, base model, and a fresh or a saved adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from loratune.adapter_files.embeddings import check_continuable
from loratune.adapter_files.peft_config import structure_of
from loratune.adapter_files.peft_format import (
    AdapterFolder,
    check_readable,
    peft_notices,
    read_adapter,
)
from loratune.adapter_files.writing_back import require_places
from loratune.config.convert import to_plain
from loratune.config.mixture import test_rows_are_the_demos
from loratune.config.schema import DataConfig, RunConfig, Stage, trained_tokens
from loratune.counting.parameters import ParameterReport
from loratune.counting.variant_table import report_variants
from loratune.data.bounds import check_positions
from loratune.data.cache import prepare_and_audit
from loratune.data.clock import now
from loratune.data.prepare import PreparedData, prepare_data
from loratune.data.reading import read_for
from loratune.errors import ConfigError, DataError
from loratune.files import BUILTIN
from loratune.models.measure import measure_model
from loratune.models.source import model_folder
from loratune.models.stored_names import StoredNames
from loratune.models.vocabulary import tokenizer_and_rows
from loratune.models.weights import tensor_entries
from loratune.runs import processes
from loratune.runs.drift import check_binding
from loratune.scoring.registry import EXACT_MATCH
from loratune.stages.load import BaseModel, load
from loratune.stages.wrap import wrap
from loratune.surgery import WrappedModel, original_weight
from loratune.training.sharding import shard_base


def load_data_and_base(
    config: RunConfig, clock: str | None = None
) -> tuple[PreparedData, BaseModel]:
    """Data first: a bad row is reported before any weight is read.

    Args:
        config: the recipe.
        clock: the moment that the run to be resumed took for now.

    Raises:
        LoratuneError: unusable rows, or an unusable base.
    """
    clock = clock or processes.broadcast(now())
    folder = model_folder(config.model.path, config.model.revision)
    tokenizer, vocabulary = tokenizer_and_rows(folder, config.model.add_tokens)
    seed = config.trainer.seed
    checked = prepare_and_audit(config.data, tokenizer, vocabulary, seed, clock=clock)
    data = checked.data
    processes.say_once(*data.report.lines())
    if Stage.train in config.stages:
        checked.audit.raise_errors()
        processes.say_once(*(finding.line for finding in checked.audit.findings))
    processes.say_once(f"base {config.model.path}")
    shard = config.launch.shard
    base = load(config.model, config.trainer.precision, tokenizer, shard=shard)
    processes.say_once(*check_positions(base.model, data.train, data.eval))
    return data, base


def adapter_to_continue(config: RunConfig) -> AdapterFolder | None:
    """The adapter of ``adapter_path``, under the recipe's training settings.

    Its structure (rank, alpha, targets) is the file's; learning rates, kernel and the like are
    the recipe's.  Variants of one structure can continue each other.

    Raises:
        ConfigError: if the recipe's variant has another structure.
    """
    if config.adapter_path is None:
        return None
    folder = read_adapter(Path(config.adapter_path))
    wanted, stored = structure_of(type(config.adapter)), structure_of(type(folder.config))
    if wanted != stored:
        raise ConfigError(
            f"the adapter is {stored}, the recipe's variant '{config.adapter.variant}' is {wanted}",
            where=f"adapter_path={config.adapter_path}",
            fix=f"set adapter={folder.config.variant}",
        )
    recorded = to_plain(config.adapter)
    return replace(folder, config=type(config.adapter).from_peft(folder.peft, recorded))


def wrap_base(
    base: BaseModel, config: RunConfig, saved: AdapterFolder | None
) -> tuple[WrappedModel, ParameterReport, list[str]]:
    """Put the recipe's adapter into the base, or the saved one that the run continues.

    A base that is to be sharded is read now, by every process its own part.

    Returns:
        The wrapped model, what every variant would train in its place, and how its base differs
        from the saved adapter's, where allowed.

    Raises:
        LoratuneError: a target that matches nothing, an adapter that does not fit, or drift.
    """
    if saved is not None and trained_tokens(config):
        raise ConfigError(
            "tokens are trained from the start of an adapter, not when one is continued",
            where="targets.tokens",
            fix="remove them (and model.add_tokens), or leave adapter_path out",
        )
    architecture = measure_model(base.model)
    drift = [] if saved is None else check_base(base, saved, config.allow_drift)
    names = StoredNames(base.model, tensor_entries(base.folder))
    is_original = base.quantization is not None and not base.quantization.in_files
    read_original = names.read if is_original else None
    wrapped = wrap(base.model, config, saved, base.tokenizer, read_original, base.unread)
    if base.unread is not None:
        shard_base(wrapped, base.unread)
    if saved is not None:
        check_continuable(saved, wrapped)
    require_places(base.folder, names, wrapped)
    check_readable(wrapped, config.model.path)
    counts = wrapped.match.counts.items()
    processes.say_once(*(f"target {pattern}: {count} layers" for pattern, count in counts))
    notices = [*wrapped.match.notices, *wrapped.config.warnings(), *peft_notices(wrapped)]
    processes.say_once(*(f"note: {line}" for line in notices))
    if saved is None and read_original and config.adapter.starts_from_quantization_error():
        processes.say_once(*quantization_errors(wrapped, read_original))
    return wrapped, report_variants(architecture, wrapped), drift


def quantization_errors(
    wrapped: WrappedModel, read_original: Callable[[str], Tensor]
) -> Iterator[str]:
    """What quantizing every adapted layer lost, and what of that the adapter's start leaves."""
    with torch.no_grad():
        for name, adapter in wrapped.adapters.items():
            layer, quantized = adapter.base_layer, adapter.weight.float()
            original = original_weight(layer, adapter.shape, read_original).to(quantized)
            lost, size = original - quantized, original.norm()
            left = lost - adapter.delta_weight(quantized).float()
            yield (
                f"quantization error of {name}: {float(lost.norm() / size):.4f} of ‖W‖, "
                f"{float(left.norm() / size):.4f} with the adapter's start"
            )


def check_base(base: BaseModel, adapter: AdapterFolder, allow_drift: Sequence[str]) -> list[str]:
    """Check that a base is the one that a saved adapter was trained on.

    Returns:
        The differences that ``allow_drift`` lets through.

    Raises:
        LoratuneError: at any other difference.
    """
    fingerprints = base.fingerprint, base.tokenizer_fingerprint
    return check_binding(adapter.facts, *fingerprints, allow_drift, where=str(adapter.path))


def evaluation_only(data: DataConfig) -> DataConfig:
    """The settings that read the rows of the final evaluation alone, where any are named."""
    path = data.test_path or data.eval_path
    if test_rows_are_the_demos(data):
        path = data.eval_path
        processes.say_once(
            f"note: data.test_path={data.test_path} belongs to the demo; the evaluation rows are "
            "used instead"
        )
    if path is None:
        return data
    return replace(data, path=None, sources=None, eval_path=path, test_path=None)


def final_rows(config: RunConfig, data: PreparedData, base: BaseModel) -> PreparedData:
    """The rows of the final evaluation: those that chose nothing, where the recipe names any.

    They are read before training, so that what is wrong with them is not found after it.
    """
    if Stage.evaluate not in config.stages:
        return data
    only = evaluation_only(config.data)
    if config.data.test_path is None or only.eval_path == config.data.eval_path:
        require_prompts(config, data)
        return data
    with read_for("data.test_path"):
        rows = prepare_data(
            only,
            base.tokenizer,
            base.vocab_size,
            config.trainer.seed,
            prompt_format=data.prompt_format,
        )
    processes.say_once(*check_positions(base.model, rows.eval))
    require_prompts(config, rows)
    return rows


def retention_rows(config: RunConfig, base: BaseModel) -> dict[str, PreparedData]:
    """The rows of every file of ``evaluate.retention``, by a name of its own.

    Raises:
        LoratuneError: unusable rows, named with ``evaluate.retention``.
    """
    rows: dict[str, PreparedData] = {}
    for path in config.evaluate.retention:
        name = path.removeprefix(BUILTIN).rstrip("/").rpartition("/")[2].partition(".")[0] or path
        settings = DataConfig(eval_path=path, max_length=config.data.max_length)
        with read_for("evaluate.retention"):
            data = prepare_data(settings, base.tokenizer, base.vocab_size, config.trainer.seed)
        processes.say_once(*check_positions(base.model, data.eval))
        rows[name if name not in rows else path] = data
    return rows


def require_prompts(config: RunConfig, rows: PreparedData) -> None:
    """Check that the metrics that the recipe asks for have answers to compare.

    Raises:
        DataError: if the rows are plain text: nobody asks anything in them.
    """
    asked = [name for name in config.evaluate.metrics if name != EXACT_MATCH]
    if asked and rows.eval and not rows.prompts:
        raise DataError(
            f"{', '.join(asked)} {'compares' if len(asked) == 1 else 'compare'} answers with "
            "references, and these rows are plain text without prompts",
            where=rows.eval[0].source,
            fix="use rows with prompts and answers, or set evaluate.metrics=[exact_match]",
        )
