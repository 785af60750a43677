"""One loaded base on which settings are tried one after the other: wrap, train, measure, unwrap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from loratune.adapters.config import AdapterConfig
from loratune.compare.fit import Fit, fit
from loratune.compare.memory import peak_bytes
from loratune.compare.result import Costs, SeedRun, Trial
from loratune.compare.rows import ComparisonRows, prepare_comparison, units
from loratune.compare.scores import UnitScores, score_units
from loratune.compare.search import Point
from loratune.config.schema import RunConfig, TrainerConfig
from loratune.counting.activations import measure_activations
from loratune.counting.parameters import count_variant, saved_modules
from loratune.data.batches import BatchPlan
from loratune.data.training_set import TrainingSet
from loratune.errors import Interrupted, LoratuneError, Preempted, TrainingError
from loratune.loss.causal_model import LanguageModelHead
from loratune.merging.weight import merged_weight
from loratune.models.architectures import Architecture
from loratune.models.load import load_tokenizer
from loratune.models.measure import measure_model
from loratune.models.source import model_folder, read_model_config
from loratune.stages.evaluate import answer_prompts, evaluation_loss
from loratune.stages.load import BaseModel, load
from loratune.surgery import WrappedModel, unwrap_model, wrap_model
from loratune.targets.find import find_targets
from loratune.targets.patterns import block_of
from loratune.training.forward import checkpoint_activations
from loratune.training.step import train_step

SEARCH_SEED_OFFSET = 1000
"""The search's seed is none of the final ones, so that no rate is chosen for a lucky draw."""


TEXTS_A_UNIT = 4
"""Held-out texts that are scored in one batch and resampled as one: a quarter of the time."""


@dataclass(frozen=True)
class Measured:
    """A seed run's numbers with the scores of every unit behind them.

    Attributes:
        member: the numbers.
        test: on the final rows.
        exact: 1 or 0 for each prompt.
        heldout: on the held-out text, if there is any.
        answers: to each prompt.
    """

    member: SeedRun
    test: UnitScores
    exact: list[float] = field(default_factory=list)
    heldout: UnitScores | None = None
    answers: list[str] = field(default_factory=list)


class Workbench:
    """The base model, the rows, and what can be measured with them.

    Attributes:
        base: the loaded base; between two measurements it is as it was loaded.
        rows: what to train on, to choose by, and to measure on.
        architecture: the base's layers and parameters.
        layers: those that the recipe's targets name.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        if config.trainer.threads:
            torch.set_num_threads(config.trainer.threads)
        folder = model_folder(config.model.path, config.model.revision)
        tokenizer = load_tokenizer(folder)
        numbers = read_model_config(folder)
        vocabulary = int(numbers.get("vocab_size") or len(tokenizer))
        self.rows: ComparisonRows = prepare_comparison(config, tokenizer, vocabulary)
        self.base: BaseModel = load(config.model, config.trainer.precision, tokenizer)
        self.architecture: Architecture = measure_model(self.base.model, numbers)
        self.layers = find_targets(
            self.architecture.layers, config.targets, config.adapter, self.architecture.family
        ).shapes
        if config.trainer.gradient_checkpointing:
            checkpoint_activations(self.base.model)
        self._units = units(self.rows.test)
        texts = range(len(self.rows.heldout))
        self._heldout_units = [list(texts[n : n + TEXTS_A_UNIT]) for n in texts[::TEXTS_A_UNIT]]

    @property
    def steps(self) -> int:
        """Optimizer steps of a whole training."""
        return self._plan(self._trainer(self.config.trainer.seed, None)).total_steps

    # -- what is measured ------------------------------------------------------------------

    def trial(self, config: AdapterConfig, point: Point, steps: int) -> Trial:
        """A short training judged by the rows to choose by; a failure is a result too."""
        seed = self.config.trainer.seed + SEARCH_SEED_OFFSET
        reason, loss = "", None
        try:
            with self._wrapped(point.applied(config), seed) as (wrapped, head):
                self._fit(wrapped, head, seed, steps, with_curve=False)
                loss = _finite(self._dev_loss(head))
        except FAILURES as error:
            reason = failure_reason(error)
        return Trial(lr=point.lr, lr_ratio=point.ratio, steps=steps, loss=loss, reason=reason)

    def seed_run(self, config: AdapterConfig, seed: int) -> Measured:
        """A whole training with one seed, and everything measured on it.

        Raises:
            LoratuneError: if it diverged, or whatever else stopped it.
        """
        with self._wrapped(config, seed) as (wrapped, head):
            result = self._fit(wrapped, head, seed, None, with_curve=True)
            test, heldout = self._score(head)
            answers, exact = self._answers(wrapped.model)
            residual = max(_residual(wrapped), default=0.0)
            peak = self._peak(wrapped, head, result.optimizer)
        run = SeedRun(
            seed=seed,
            order=result.order,
            loss=_finite(test.mean_loss),
            token_accuracy=test.token_accuracy,
            exact_match=sum(exact) / len(exact) if exact else None,
            step_seconds=result.step_seconds,
            peak_bytes=peak,
            merge_residual=residual,
            curve=result.curve,
        )
        return Measured(run, test, exact, heldout, answers)

    def base_scores(self) -> Measured:
        """The base model on the same rows, as a run of seed -1 that trained nothing."""
        head = LanguageModelHead(self.base.model.eval())
        test, heldout = self._score(head)
        answers, exact = self._answers(self.base.model)
        run = SeedRun(
            seed=-1,
            loss=test.mean_loss,
            token_accuracy=test.token_accuracy,
            exact_match=sum(exact) / len(exact) if exact else None,
        )
        return Measured(run, test, exact, heldout, answers)

    def costs(self, config: AdapterConfig) -> Costs:
        """What a setting costs: closed forms, and one block's activations."""
        saved = saved_modules(self.architecture, self.config.targets.modules_to_save)
        count = count_variant(self.architecture.base_parameters, self.layers, config, saved)
        added, base = self._activations(config)
        return Costs(
            rank=config.rank,
            trainable=count.trainable,
            frozen=count.frozen,
            percent_of_base=count.percent_of_base,
            stored_bytes=count.stored_bytes,
            optimizer_bytes=count.optimizer_bytes,
            activation_bytes_per_token=added,
            base_activation_bytes_per_token=base,
        )

    # -- parts -----------------------------------------------------------------------------

    @contextmanager
    def _wrapped(
        self, config: AdapterConfig, seed: int
    ) -> Iterator[tuple[WrappedModel, LanguageModelHead]]:
        """The base with fresh adapters; without them again afterwards, whatever happens."""
        wrapped = wrap_model(self.base.model, config, self.config.targets, seed=seed)
        try:
            yield wrapped, LanguageModelHead(wrapped.model)
        finally:
            unwrap_model(wrapped)
            self.base.model.eval()

    def _trainer(self, seed: int, steps: int | None) -> TrainerConfig:
        trainer, own = self.config.trainer, self.config.compare.steps
        steps = steps if steps is not None else own
        if steps is not None:
            warmup = min(trainer.warmup_steps, steps // 4)
            return replace(
                trainer, seed=seed, steps=steps, epochs=None, warmup_steps=warmup, lr=None
            )
        return replace(trainer, seed=seed, lr=None)

    def _plan(self, trainer: TrainerConfig) -> BatchPlan:
        lengths = [len(row) for row in self.rows.train]
        return BatchPlan.from_config(lengths, self.config.data, trainer)

    def _fit(
        self,
        wrapped: WrappedModel,
        head: LanguageModelHead,
        seed: int,
        steps: int | None,
        *,
        with_curve: bool,
    ) -> Fit:
        # The rate is the point's own: the recipe's factor went into the grid.
        trainer = replace(self._trainer(seed, steps), lr_scale=1.0)
        rows = TrainingSet.from_config(self.rows.train, self.rows.pad_id, self.config.data, trainer)
        dev_loss = (lambda: self._dev_loss(head)) if with_curve else None
        return fit(wrapped, head, rows, trainer, dev_loss)

    def _dev_loss(self, head: LanguageModelHead) -> float:
        batch_size = self.config.evaluate.batch_size
        return evaluation_loss(head, self.rows.dev, self.rows.pad_id, batch_size)[0]

    def _score(self, head: LanguageModelHead) -> tuple[UnitScores, UnitScores | None]:
        size, pad_id = self.config.evaluate.batch_size, self.rows.pad_id
        test = score_units(head, self.rows.test, self._units, pad_id, size)
        if not self.rows.heldout:
            return test, None
        return test, score_units(head, self.rows.heldout, self._heldout_units, pad_id, size)

    def _answers(self, model: Any) -> tuple[list[str], list[float]]:
        return answer_prompts(
            model, self.base.tokenizer, self.rows.prompts, self.config.evaluate, self.rows.pad_id
        )

    def _peak(
        self, wrapped: WrappedModel, head: LanguageModelHead, optimizer: torch.optim.Optimizer
    ) -> int:
        """Of a step on the longest rows; it comes last, since it moves the adapter once more."""
        size = self.config.trainer.batch_size
        longest = sorted(self.rows.train, key=len)[-size:]
        rows = TrainingSet(
            longest,
            self._plan(self.config.trainer),
            self.rows.pad_id,
            self.config.data.packing,
            self.config.data.max_length,
        )
        batch = rows.batch(range(len(longest))).to(self.base.device)
        wrapped.model.train()
        clip = self.config.trainer.clip_norm
        return peak_bytes(
            wrapped.model, optimizer, lambda: train_step(head, [batch], optimizer, clip, 0)
        )

    def _activations(self, config: AdapterConfig) -> tuple[float | None, float | None]:
        """Bytes a token that autograd holds for adapters and base, over all adapted blocks."""
        blocks = len({block_of(shape.name) for shape in self.layers} - {None})
        try:
            report = measure_activations(self.architecture, self.config.targets, config)
        except LoratuneError:  # a model that cannot be cut down to one block
            return None, None
        return report.added * max(1, blocks), report.base * max(1, blocks)


FAILURES = (LoratuneError, RuntimeError, MemoryError, ArithmeticError)
"""What makes one training fail and leaves the others alone."""


def failure_reason(error: BaseException) -> str:
    """A failure in one line; a request to stop is raised again."""
    if isinstance(error, (Interrupted, Preempted)):
        raise error
    if isinstance(error, LoratuneError):
        return "; ".join(part for part in (error.cause, error.where) if part)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "out of memory"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def _finite(loss: float) -> float:
    if not torch.isfinite(torch.tensor(loss)):
        raise TrainingError(f"the loss is {loss} after training", fix="lower the learning rate")
    return loss


def _residual(wrapped: WrappedModel) -> Sequence[float]:
    """‖(W' − W) − ΔW‖ / ‖ΔW‖ of every module, merged in the base's own dtype."""
    return [
        merged_weight(adapter.weight, [adapter], adapter.weight.dtype)[1].residual
        for adapter in wrapped.adapters.values()
    ]
