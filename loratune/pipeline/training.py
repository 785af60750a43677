"""Training as a stage of a run: order of rows, preparation of the model, what is printed."""

from __future__ import annotations

from dataclasses import replace

from loratune.config.convert import to_plain
from loratune.config.schema import RunConfig, trained_tokens
from loratune.data.arrangement import Arrangement, arrange
from loratune.data.prepare import PreparedData
from loratune.data.training_set import TrainingSet
from loratune.loss.causal_model import LanguageModelHead
from loratune.loss.routers import router_coefficient
from loratune.pipeline.records import Records
from loratune.runs import processes
from loratune.runs.checkpoint import Checkpoint
from loratune.stages.evaluate import evaluation_scores
from loratune.stages.train import Evaluate, TrainResult, train
from loratune.surgery import WrappedModel
from loratune.training.advice import Setup, summary_lines
from loratune.training.forward import checkpoint_activations
from loratune.training.history import History
from loratune.training.optim import warmup_warning
from loratune.training.sharding import is_sharded
from loratune.training.torch_errors import compile_errors
from loratune.training.trackers import open_trackers


def train_adapter(
    records: Records,
    data: PreparedData,
    wrapped: WrappedModel,
    head: LanguageModelHead,
    checkpoint: Checkpoint | None,
) -> TrainResult:
    """Train the adapter and say what came of it.

    Raises:
        LoratuneError: whatever stopped training; published checkpoints stay whole.
    """
    config = records.config
    arrangement, notes = arrange(config, wrapped.model, data.pad_id, data.train, data.eval)
    processes.say_once(*notes, *_router_notes(wrapped, head))
    rows = TrainingSet.from_config(data.train, arrangement, config.data, config.trainer)
    rows = replace(rows, together=is_sharded(wrapped.model))
    warning = warmup_warning(rows.plan.total_steps, config.trainer)
    processes.say_once(*([f"warning: {warning}"] if warning else []))
    processes.say_once(*_unseen_tokens(config, wrapped, data))
    if config.trainer.gradient_checkpointing:
        checkpoint_activations(wrapped.model)
    step = checkpoint.step if checkpoint else 0
    trackers = open_trackers(config, records.run_dir, step) if processes.is_main() else []
    with compile_errors():
        if config.trainer.compile:
            head.compile_backbone()
        result = train(
            wrapped,
            head,
            rows,
            config.trainer,
            records.run_dir,
            facts=records.facts,
            checkpoint=checkpoint,
            evaluate=_evaluation(config, data, head, arrangement),
            trackers=trackers,
        )
    processes.say_once(*_result_lines(records, result))
    return result


def _unseen_tokens(config: RunConfig, wrapped: WrappedModel, data: PreparedData) -> list[str]:
    """A warning where the rows hold none of a token that is to be trained."""
    trained = next(iter(wrapped.token_rows.values()), None)
    if trained is None:
        return []
    seen = {token for row in data.train for token in row.input_ids}
    named = zip(trained_tokens(config), trained.token_ids.tolist(), strict=True)
    unseen = [f"'{text}'" for text, token in named if token not in seen]
    return [f"warning: no training row has the token {', '.join(unseen)}"] if unseen else []


def _router_notes(wrapped: WrappedModel, head: LanguageModelHead) -> list[str]:
    """What becomes of a loss that the model has for its routers."""
    coefficient = router_coefficient(wrapped.model)
    if not coefficient:
        return []
    what = f"note: the load-balancing loss of the model's routers (coefficient {coefficient:g}) is "
    if head.routers is not None:
        return [what + "trained on as well; the losses shown are the supervised tokens' alone"]
    return [what + "left out; trainer.router_loss=true trains on it as well"]


def _evaluation(
    config: RunConfig, data: PreparedData, head: LanguageModelHead, arrangement: Arrangement
) -> Evaluate | None:
    """What ``trainer.eval_every`` measures."""
    if not data.eval or not config.trainer.eval_every:
        return None

    def measure() -> dict[str, float]:
        scores = evaluation_scores(head, data.eval, arrangement, config.evaluate.batch_size)
        own = {f"eval/loss/{name}": loss for name, loss in scores.source_losses.items()}
        return {"eval/loss": scores.loss, "eval/token_accuracy": scores.token_accuracy, **own}

    return measure


def _result_lines(records: Records, result: TrainResult) -> list[str]:
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    history = History.read(records.run_dir.metrics, records.run_dir.timings)
    return [
        f"trained {result.steps} steps in {result.seconds:.1f} s{loss}",
        *summary_lines(history, Setup.of(to_plain(records.config))),
    ]
