"""One loaded base on which settings are tried one after the other: wrap, train, measure, unwrap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from loratune.adapters.config import AdapterConfig, LayerShape
from loratune.compare.fit import Fit, fit
from loratune.compare.memory import peak_bytes
from loratune.compare.result import Costs, SeedRun, Trial
from loratune.compare.rows import ComparisonRows, prepare_comparison
from loratune.compare.scores import UnitScores, score_units
from loratune.compare.search import Point
from loratune.config.schema import RunConfig, TargetsConfig, TrainerConfig, trained_tokens
from loratune.counting.activations import measure_activations
from loratune.counting.parameters import count_in
from loratune.data.arrangement import arrange
from loratune.data.bounds import check_positions
from loratune.data.encoded_rows import EncodedRow
from loratune.data.questions import units
from loratune.data.training_set import TrainingSet
from loratune.errors import Interrupted, LoratuneError, Preempted, TrainingError
from loratune.loss.causal_model import LanguageModelHead
from loratune.merging.weight import merged_weight
from loratune.models.measure import measure_model
from loratune.models.probes.layers import unusable_layers
from loratune.models.source import model_folder, read_model_config
from loratune.models.vocabulary import token_ids, tokenizer_and_rows
from loratune.stages.evaluate import answer_prompts, evaluation_loss
from loratune.stages.load import load
from loratune.surgery import WrappedModel, unwrap_model, wrap_model
from loratune.targets.find import find_targets
from loratune.targets.patterns import block_of
from loratune.training.forward import checkpoint_activations
from loratune.training.optim import warmup_steps
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
        parts: name of every metric of ``evaluate.metrics`` to its numbers of each prompt.
    """

    member: SeedRun
    test: UnitScores
    exact: list[float] = field(default_factory=list)
    heldout: UnitScores | None = None
    answers: list[str] = field(default_factory=list)
    parts: dict[str, list[list[float]]] = field(default_factory=dict)


class Workbench:
    """The base model, the rows, and what can be measured with them.

    Attributes:
        base: the loaded base; between two measurements it is as it was loaded.
        rows: what to train on, to choose by, and to measure on.
        architecture: the base's layers and parameters.
        unusable: those that no adapter can do anything for, and why.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        if config.trainer.threads:
            torch.set_num_threads(config.trainer.threads)
        folder = model_folder(config.model.path, config.model.revision)
        numbers = read_model_config(folder)
        tokenizer, self._vocabulary = tokenizer_and_rows(folder, config.model.add_tokens)
        rows = prepare_comparison(config, tokenizer, self._vocabulary)
        self.base = load(config.model, config.trainer.precision, tokenizer)
        self._take(rows)
        self.architecture = measure_model(self.base.model, numbers)
        self.unusable = unusable_layers(self.base.model)
        self.layers(config.targets, config.adapter)
        self.arrangement, _ = arrange(config, self.base.model, rows.pad_id, rows.every)
        if config.trainer.gradient_checkpointing:
            checkpoint_activations(self.base.model)

    def stop_clock(self, moment: str) -> None:
        """Write the rows as of ``moment``, where the chat template reads the time.

        Raises:
            LoratuneError: rows that are unusable then.
        """
        if self.rows.clock not in (None, moment):
            tokenizer = self.base.tokenizer
            self._take(prepare_comparison(self.config, tokenizer, self._vocabulary, moment))

    def _take(self, rows: ComparisonRows) -> None:
        check_positions(self.base.model, rows.every)
        self.rows, self._units = rows, units(rows.test)
        texts = range(len(rows.heldout))
        self._heldout_units = [list(texts[n : n + TEXTS_A_UNIT]) for n in texts[::TEXTS_A_UNIT]]

    def layers(
        self, targets: TargetsConfig, config: AdapterConfig | None = None
    ) -> tuple[LayerShape, ...]:
        """The layers that targets name.

        Args:
            targets: names, words or a regular expression.
            config: a variant that must be able to adapt them; ``None`` asks nobody.

        Raises:
            LoratuneError: targets that name nothing, or layers that the variant cannot adapt.
        """
        architecture = self.architecture
        return find_targets(
            architecture.layers, targets, config, architecture.family, unusable=self.unusable
        ).shapes

    def steps(self, recipe: RunConfig) -> int:
        """Optimizer steps of a whole training."""
        trainer = _trainer(recipe, recipe.trainer.seed)
        return self._training_set(self.rows.train, trainer, recipe.adapter).plan.total_steps

    # -- what is measured ------------------------------------------------------------------

    def trial(self, recipe: RunConfig, point: Point, steps: int) -> Trial:
        """A short training judged by the rows to choose by; a failure is a result too."""
        seed = self.config.trainer.seed + SEARCH_SEED_OFFSET
        reason, loss = "", None
        try:
            with self._wrapped(point.applied(recipe.adapter), recipe.targets, seed) as parts:
                wrapped, head = parts
                self._fit(wrapped, head, _trainer(recipe, seed, steps))
                loss = _finite(self._dev_loss(head))
        except FAILURES as error:
            reason = failure_reason(error)
        return Trial(lr=point.lr, lr_ratio=point.ratio, steps=steps, loss=loss, reason=reason)

    def seed_run(self, recipe: RunConfig, seed: int) -> Measured:
        """A whole training with one seed, at the adapter's own rate, and all that is measured.

        Raises:
            LoratuneError: if it diverged, or whatever else stopped it.
        """
        with self._wrapped(recipe.adapter, recipe.targets, seed) as (wrapped, head):
            trainer = _trainer(recipe, seed)
            result = self._fit(
                wrapped,
                head,
                trainer,
                dev_loss=lambda: self._dev_loss(head),
                heldout_loss=self._heldout_loss(head),
            )
            measured = self._measure(head, seed)
            _finite(measured.test.mean_loss)
            residual = max(_residuals(wrapped), default=0.0)
            peak = self._peak(wrapped, head, trainer, result.optimizer)
        run = replace(
            measured.member,
            order=result.order,
            step_seconds=result.step_seconds,
            peak_bytes=peak,
            merge_residual=residual,
            curve=result.curve,
        )
        return replace(measured, member=run)

    def base_scores(self) -> Measured:
        """The base model on the same rows, as a run of seed -1 that trained nothing."""
        return self._measure(LanguageModelHead(self.base.model.eval()), -1)

    def costs(self, recipe: RunConfig) -> Costs:
        """What a setting costs: closed forms, and one block's activations."""
        config, targets, tokens = recipe.adapter, recipe.targets, self._tokens(recipe.targets)
        layers, saved = self.layers(targets), targets.modules_to_save
        count = count_in(self.architecture, layers, config, saved, tokens=len(tokens))
        added, base = self._activations(config, targets, layers)
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
        self, config: AdapterConfig, targets: TargetsConfig, seed: int
    ) -> Iterator[tuple[WrappedModel, LanguageModelHead]]:
        """The base with fresh adapters; without them again afterwards, whatever happens."""
        wrapped = wrap_model(
            self.base.model,
            config,
            targets,
            seed=seed,
            unusable=self.unusable,
            tokens=self._tokens(targets),
        )
        try:
            routers = self.config.trainer.router_loss
            yield wrapped, LanguageModelHead(wrapped.model, router_loss=routers)
        finally:
            unwrap_model(wrapped)
            self.base.model.eval()

    def _tokens(self, targets: TargetsConfig) -> list[int]:
        words = trained_tokens(replace(self.config, targets=targets))
        return token_ids(self.base.tokenizer, words)

    def _training_set(
        self, rows: Sequence[EncodedRow], trainer: TrainerConfig, adapter: AdapterConfig
    ) -> TrainingSet:
        """Rows as a setting trains on them, whose dropout need not be the recipe's."""
        arrangement = self.arrangement.under_dropout(adapter.dropout)
        return TrainingSet.from_config(rows, arrangement, self.config.data, trainer)

    def _fit(
        self,
        wrapped: WrappedModel,
        head: LanguageModelHead,
        trainer: TrainerConfig,
        dev_loss: Callable[[], float] | None = None,
        heldout_loss: Callable[[], float] | None = None,
    ) -> Fit:
        rows = self._training_set(self.rows.train, trainer, wrapped.config)
        return fit(wrapped, head, rows, trainer, dev_loss, heldout_loss)

    def _dev_loss(self, head: LanguageModelHead) -> float:
        batch_size = self.config.evaluate.batch_size
        return evaluation_loss(head, self.rows.dev, self.arrangement, batch_size)[0]

    def _heldout_loss(self, head: LanguageModelHead) -> Callable[[], float] | None:
        """Measured along the way where forgetting is wanted at a target loss: it takes its time."""
        rows, size = self.rows.heldout, self.config.evaluate.batch_size
        if not rows or self.config.compare.target_loss is None:
            return None
        return lambda: evaluation_loss(head, rows, self.arrangement, size)[0]

    def _measure(self, head: LanguageModelHead, seed: int) -> Measured:
        """Scores and answers of a model in eval mode."""
        rows, config, heldout = self.rows, self.config.evaluate, None
        arrangement, size = self.arrangement, config.batch_size
        test = score_units(head, rows.test, self._units, arrangement, size)
        if rows.heldout:
            heldout = score_units(head, rows.heldout, self._heldout_units, arrangement, size)
        tokenizer = self.base.tokenizer
        answers = answer_prompts(
            head.model, tokenizer, rows.prompts, config, rows.pad_id, rows.prompt_format
        )
        exact = answers.exact
        run = SeedRun(
            seed=seed,
            loss=test.mean_loss,
            token_accuracy=test.token_accuracy,
            exact_match=sum(exact) / len(exact) if exact else None,
        )
        return Measured(run, test, exact, heldout, answers.texts, answers.parts)

    def _peak(
        self,
        wrapped: WrappedModel,
        head: LanguageModelHead,
        trainer: TrainerConfig,
        optimizer: torch.optim.Optimizer,
    ) -> int:
        """Of a step on the longest rows; it comes last, since it moves the adapter once more."""
        longest = sorted(self.rows.train, key=len)[-trainer.batch_size :]
        rows = self._training_set(longest, trainer, wrapped.config)
        batch = rows.batch(range(len(longest))).to(self.base.device)
        wrapped.model.train()
        return peak_bytes(
            wrapped.model,
            optimizer,
            lambda: train_step(head, [batch], optimizer, trainer.clip_norm, 0),
        )

    def _activations(
        self, config: AdapterConfig, targets: TargetsConfig, layers: Sequence[LayerShape]
    ) -> tuple[float | None, float | None]:
        """Bytes a token that autograd holds for adapters and base, over all adapted blocks."""
        blocks = len({block_of(shape.name) for shape in layers} - {None})
        try:
            report = measure_activations(self.architecture, targets, config)
        except FAILURES:  # a model that cannot be cut down to one block, or no memory for it
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
    is_cpu_memory = "can't allocate memory" in str(error)  # of torch, a plain RuntimeError
    if is_cpu_memory or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "out of memory"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def _trainer(recipe: RunConfig, seed: int, steps: int | None = None) -> TrainerConfig:
    """The recipe's, for ``steps`` steps; the rate is the adapter's own.

    The recipe's rate and factor went into the grid of the search.
    """
    trainer = replace(recipe.trainer, seed=seed, lr=None, lr_scale=1.0)
    steps = steps or recipe.compare.steps
    if steps is None:
        return trainer
    warmup = min(warmup_steps(steps, trainer), steps // 4)
    return replace(trainer, steps=steps, epochs=None, warmup_steps=warmup, warmup_ratio=0.0)


def _finite(loss: float) -> float:
    if not torch.isfinite(torch.tensor(loss)):
        raise TrainingError(f"the loss is {loss} after training", fix="lower the learning rate")
    return loss


def _residuals(wrapped: WrappedModel) -> list[float]:
    """‖(W' − W) − ΔW‖ / ‖ΔW‖ of every module, merged in the base's own dtype."""
    return [
        merged_weight(adapter.weight, [adapter], adapter.weight.dtype)[1].residual
        for adapter in wrapped.adapters.values()
    ]
