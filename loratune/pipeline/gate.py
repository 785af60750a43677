"""``gate``: may this run go on?  Measured again, from its adapter, base and rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from loratune.adapter_files.peft_format import TENSORS
from loratune.config.schema import GateConfig, RunConfig
from loratune.data.prepare import PreparedData, prepare_data
from loratune.errors import ConfigError, DataError, ModelError
from loratune.loss.causal_model import LanguageModelHead
from loratune.models.fingerprint import file_fingerprint
from loratune.pipeline.commands import LoadedAdapter, final_rows_of, load_adapted
from loratune.pipeline.later_stages import evaluate_with_retention
from loratune.pipeline.loading import retention_rows
from loratune.report.gate_result import Demand, GateResult
from loratune.runs.provenance import merged_before
from loratune.runs.run_dir import RunDir
from loratune.scoring.registry import EXACT_MATCH, metric_label
from loratune.scoring.resampling import Gain
from loratune.stages.evaluate import Evaluation
from loratune.surgery import trained_values
from loratune.units import byte_size, parse_bytes, significant
from loratune.verify import verify

LOSS = "loss"


def gate(config: RunConfig, run_dir: RunDir) -> GateResult:
    """Check a run against what its recipe's ``gate`` demands.

    Args:
        config: the run's recipe, with what the command line changes of it.
        run_dir: the run.

    Raises:
        LoratuneError: a run that cannot be judged: files that are not as they were published, a
            base or rows that are not its own, test rows that were trained on, an adapter that
            changes nothing, or a base that holds the adapter already.
    """
    config = _measuring(config)
    verify(run_dir.path).raise_problems()
    loaded = load_adapted(config, run_dir.adapter, base_named=True)
    _check_base_and_adapter(loaded)
    rows = final_rows_of(config, loaded)
    _check_not_trained_on(config, loaded, rows)
    result = evaluate_with_retention(
        loaded.wrapped,
        LanguageModelHead(loaded.wrapped.model),
        loaded.base.tokenizer,
        rows,
        retention_rows(config, loaded.base),
        config,
    )
    demands = [_gain(config.gate, result), *_forgetting(config.gate, result)]
    demands += [*_size(config.gate, run_dir), *_merge(config.gate, run_dir, loaded)]
    return GateResult(str(run_dir.path), demands, result.as_dict())


def _measuring(config: RunConfig) -> RunConfig:
    """The recipe, measuring what its gate asks for.

    Raises:
        ConfigError: demands that contradict the recipe.
    """
    wanted, evaluate = config.gate, config.evaluate
    if config.allow_drift:
        cause = "a gate judges the run as it was trained"
        raise ConfigError(cause, where="allow_drift", fix="leave it out")
    if wanted.max_forgetting is not None and not evaluate.retention:
        cause = "there is nothing to measure forgetting on"
        raise ConfigError(cause, where="gate.max_forgetting", fix="set evaluate.retention=[FILE]")
    metrics = list(evaluate.metrics)
    if wanted.metric not in (LOSS, *metrics):
        metrics.append(wanted.metric)
    generate = evaluate.generate or wanted.metric != LOSS
    return replace(
        config, evaluate=replace(evaluate, base=True, metrics=metrics, generate=generate)
    )


# -- what makes a run unfit to be judged ---------------------------------------------------


@torch.no_grad()
def _check_base_and_adapter(loaded: LoadedAdapter) -> None:
    """Check that base and adapted model are two models, and that the base is the base.

    Raises:
        ModelError: if not.
    """
    adapter, base, wrapped = loaded
    where = str(adapter.path)
    if "base" not in adapter.facts:
        raise ModelError("the adapter does not say which base it was trained on", where=where)
    before = merged_before(base.folder)
    if before is not None and file_fingerprint(adapter.path / TENSORS) in (
        before["adapters"] or []
    ):
        raise ModelError(
            "the base holds this adapter already: the tuned model is passed off as its base",
            where=str(base.folder),
            fix="set model.path to the base that was trained on",
        )
    changes = any(bool(one.delta_weight().any()) for one in wrapped.adapters.values())
    parameters = dict(wrapped.model.named_parameters())
    changes = changes or any(
        name not in parameters or not torch.equal(parameters[name].float(), value.float())
        for name, value in trained_values(wrapped).items()
    )
    if not changes:
        raise ModelError(
            "the adapter changes nothing: the base is passed off as the tuned model",
            where=where,
            fix="train it: its run has not moved it",
        )


def _check_not_trained_on(config: RunConfig, loaded: LoadedAdapter, rows: PreparedData) -> None:
    """Check that no test row is among the rows that the adapter was trained on.

    Raises:
        DataError: if one is, or if the training rows cannot be told.
    """
    base, facts = loaded.base, loaded.adapter.facts
    data = prepare_data(
        config.data, base.tokenizer, base.vocab_size, config.trainer.seed, clock=rows.clock
    )
    if data.fingerprint != facts.get("data"):
        raise DataError(
            "the training rows are not those that the adapter was trained on, so nobody can tell "
            "whether the test rows are among them",
            where="data.path",
            fix="leave data.path and data.eval_path as the run has them",
        )
    trained = {tuple(row.input_ids) for row in data.train}
    seen = [row for row in rows.eval if tuple(row.input_ids) in trained]
    if seen:
        raise DataError(
            f"{len(seen):,} of {len(rows.eval):,} test rows were trained on",
            where=seen[0].source,
            fix="set data.test_path to rows that training never saw",
        )


# -- demands -------------------------------------------------------------------------------


def _gain(wanted: GateConfig, result: Evaluation) -> Demand:
    key = wanted.metric
    if key not in result.gains:
        raise DataError(
            f"gate.metric={key} compares answers, and these rows are plain text without prompts",
            where="gate.metric",
            fix="set gate.metric=loss",
        )
    gain = _upwards(result.gains[key]) if key == LOSS else result.gains[key]
    low = gain.difference if gain.low is None else gain.low
    return Demand(
        f"gain in {LOSS if key == LOSS else metric_label(key)}",
        f"above {_value(wanted.min_gain, key)} (95 % interval)",
        _with_interval(gain, key),
        low > wanted.min_gain,
        "train longer, at another rate, or on more rows",
    )


def _upwards(gain: Gain) -> Gain:
    """A loss that fell is a gain."""
    low, high = (None if end is None else -end for end in (gain.high, gain.low))
    return Gain(-gain.difference, low, high, gain.p)


def _forgetting(wanted: GateConfig, result: Evaluation) -> Iterator[Demand]:
    if wanted.max_forgetting is None:
        return
    for name, kept in result.retention.items():
        gain = kept.gains[LOSS]
        high = gain.difference if gain.high is None else gain.high
        yield Demand(
            f"forgetting on {name}",
            f"at most {_value(wanted.max_forgetting, LOSS)} nats per token (95 % interval)",
            _with_interval(gain, LOSS),
            high <= wanted.max_forgetting,
            "try loratune rewind, fewer steps, or a share of general rows (data.sources)",
        )


def _size(wanted: GateConfig, run_dir: RunDir) -> Iterator[Demand]:
    if wanted.max_bytes is None:
        return
    most, size = parse_bytes(wanted.max_bytes), (run_dir.adapter / TENSORS).stat().st_size
    assert most is not None  # value_checks has looked at it
    fix = "lower adapter.rank, or adapt fewer layers"
    yield Demand("adapter file", f"at most {byte_size(most)}", byte_size(size), size <= most, fix)


def _merge(wanted: GateConfig, run_dir: RunDir, loaded: LoadedAdapter) -> Iterator[Demand]:
    """Every weight of the merged model is computed again from base and adapter."""
    if not wanted.merge:
        return
    name, limit = "merged model", "proved again from base and adapter"
    if not run_dir.merge_report.exists():
        yield Demand(name, limit, "there is none", False, f"loratune merge run={run_dir.path}")
        return
    verification = verify(run_dir.merged, loaded.base.folder, [run_dir.adapter])
    verification.raise_problems()
    yield Demand(name, limit, f"{len(verification.checks):,} checks, nothing differs", True)


def _with_interval(gain: Gain, key: str) -> str:
    if gain.low is None or gain.high is None:
        return _value(gain.difference, key)
    ends = f"[{_value(gain.low, key)}, {_value(gain.high, key)}]"
    return f"{_value(gain.difference, key)} {ends}"


def _value(value: float, key: str) -> str:
    return f"{100 * value:.3g} points" if key == EXACT_MATCH else significant(value)
