"""From finished tasks to a comparison: means, intervals, differences, findings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loratune.compare.metrics import (
    BY_KEY,
    FORGETTING,
    LOSS,
    Metric,
    difference_in_words,
    metric_of,
    metrics_with,
)
from loratune.compare.plan import ComparisonPlan, Task, VariantSearch
from loratune.compare.result import (
    BaseScores,
    ComparedSample,
    Costs,
    Difference,
    Estimate,
    SeedRun,
    Trial,
    VariantResult,
    build,
)
from loratune.compare.statistics import SIGNIFICANT, Interval, Scores, holm, interval, over_seeds
from loratune.compare.store import FAILED
from loratune.compare.text_scores import TextScores
from loratune.config.convert import to_plain
from loratune.config.schema import CompareConfig
from loratune.data.prepare import GenerationPrompt
from loratune.data.tokenizing import Tokenizer
from loratune.scoring.registry import text_metrics
from loratune.scoring.resampling import score_of

SAMPLES = 6
_OVER_SEEDS = (
    "step_seconds",
    "peak_bytes",
    "steps_to_target",
    "seconds_to_target",
    "forgetting_at_target",
    "merge_residual",
)


class Assembly:
    """What the tasks of a comparison come to.

    Attributes:
        variants: the result of each setting.
        differences: every pair in every metric.
        target_loss: dev loss of the time-to-target columns.
        text_metrics: name to metric of those that were measured on answers, besides exact match.
    """

    def __init__(self, plan: ComparisonPlan, compare: CompareConfig, steps: int) -> None:
        """Put the results together.

        Args:
            plan: whose tasks are finished.
            compare: target loss and margin.
            steps: of a final training, where a contender has none of its own.
        """
        self._plan, self._margin, self._steps = plan, compare.margin, steps
        target_loss = compare.target_loss
        self._base = plan.result(plan.base()) or {}
        measured = [name for name in self._base.get("parts", {}) if name not in BY_KEY]
        self.text_metrics = {metric.name: metric for metric in text_metrics(measured)}
        self._metrics = metrics_with(self.text_metrics)
        self._scores: dict[str, list[dict[str, Any]]] = {}
        variants = list(map(self._variant, plan.searches))
        self.target_loss = target_loss if target_loss is not None else _common_target(variants)
        self.variants = list(map(self._with_estimates, variants))
        self.differences = self._differences()

    # -- one variant -----------------------------------------------------------------------

    def _variant(self, one: VariantSearch) -> VariantResult:
        plan, setting, trials = self._plan, one.setting, self._plan.trials(one)
        point = plan.winner(one)
        notes = list(setting.notes)
        if point is not None and one.search.is_at_edge(point, trials):
            notes.append(
                f"its best rate, {point.lr:g}, is the last one tried: give a wider lr_grid"
            )
        runs = list(map(self._seed_run, plan.seed_runs(one)))
        return VariantResult(
            label=setting.label,
            variant=setting.config.variant,
            costs=build(Costs, plan.result(plan.costs(setting))),
            adapter=to_plain(point.applied(setting.config) if point else setting.config),
            lr=point.lr if point else None,
            lr_ratio=point.ratio if point else None,
            search=sorted(trials.values(), key=lambda trial: trial.steps),
            members=runs,
            reason=_whole_failure(list(trials.values()), runs, point is None),
            notes=notes,
            overrides=dict(setting.overrides),
            changes=dict(setting.changes),
            steps=one.search.rungs[-1] if one.search.rungs[-1] != self._steps else None,
        )

    def _seed_run(self, task: Task) -> SeedRun:
        value = self._plan.result(task) or {FAILED: "not finished"}
        if FAILED in value:
            return SeedRun(seed=task.seed, reason=value[FAILED])
        assert task.setting is not None
        self._scores.setdefault(task.setting.label, []).append(value)
        run, scores = build(SeedRun, value["member"]), self._scores_of([value], "heldout")
        run = replace(run, text=self._text_values(value))
        if scores is None:
            return run
        return replace(run, forgetting=interval(scores, resamples=1).mean)

    def _with_estimates(self, variant: VariantResult) -> VariantResult:
        runs = [self._on_target(run) for run in variant.members]
        finished = [run for run in runs if not run.reason]
        estimates: dict[str, Estimate] = {}
        for metric in self._metrics:
            scores = self._scores_of(self._scores.get(variant.label, []), metric.source)
            if scores is not None:
                estimates[metric.key] = _estimate(interval(scores), scores.seeds, scores.units)
        for key in _OVER_SEEDS:
            values = [float(v) for run in finished if (v := getattr(run, key)) is not None]
            if values:
                estimates[key] = _estimate(over_seeds(values), len(values), 0)
        return replace(variant, members=runs, estimates=estimates)

    def _on_target(self, run: SeedRun) -> SeedRun:
        steps = _steps_to(run, self.target_loss)
        if steps is None:
            return run
        seconds = None if run.step_seconds is None else steps * run.step_seconds
        return replace(
            run,
            steps_to_target=steps,
            seconds_to_target=seconds,
            forgetting_at_target=self._forgotten_after(run, steps),
        )

    def _forgotten_after(self, run: SeedRun, step: float) -> float | None:
        """Forgetting after so many steps, on straight lines between measurements."""
        heldout = self._base.get("heldout")
        points = [(p.step, p.heldout_loss) for p in run.curve if p.heldout_loss is not None]
        for (start, before), (end, after) in itertools.pairwise(points):
            if heldout and start <= step <= end:
                loss = before + (step - start) / (end - start) * (after - before)
                return float(loss - sum(heldout["loss"]) / sum(heldout["tokens"]))
        return None

    def _text_values(self, value: dict[str, Any]) -> dict[str, float]:
        parts = value.get("parts", {})
        return {name: score_of(metric, parts[name]) for name, metric in self.text_metrics.items()}

    # -- scores ----------------------------------------------------------------------------

    def _scores_of(
        self, values: Sequence[dict[str, Any]], source: str
    ) -> Scores | TextScores | None:
        """One metric of several runs, unit by unit; ``None`` where it was not measured."""
        if not values:
            return None
        if source in self.text_metrics:
            parts = [value["parts"][source] for value in values]
            return TextScores(self.text_metrics[source], [(1.0, parts)])
        if source == "exact":
            sums = [value["exact"] for value in values]
            return Scores(sums, [1.0] * len(sums[0])) if sums[0] else None
        if source == "heldout":
            base = self._base.get("heldout")
            if not base:
                return None
            forgotten = [
                [new - old for new, old in zip(v["heldout"]["loss"], base["loss"], strict=True)]
                for v in values
            ]
            return Scores(forgotten, base["tokens"])
        tokens = values[0]["test"]["tokens"]
        return Scores([value["test"][source] for value in values], tokens)

    # -- pairs -----------------------------------------------------------------------------

    def _differences(self) -> list[Difference]:
        differences: list[Difference] = []
        labels = [variant.label for variant in self.variants if variant.label in self._scores]
        for metric in self._metrics:
            margin = self._margin_of(metric)
            pairs = [
                self._pair(metric, first, second, margin)
                for first, second in itertools.combinations(labels, 2)
            ]
            differences += _corrected([pair for pair in pairs if pair is not None])
        return differences

    def _margin_of(self, metric: Metric) -> float | None:
        """What counts as no difference: a share of the best one's gain over the base.

        Forgetting has no gain; it is in the loss's unit and takes the loss's margin.  ``None``
        where nothing was gained.
        """
        key = LOSS if metric.key == FORGETTING else metric.key
        values = {**(self._base.get("member") or {}), **self._text_values(self._base)}
        base = values.get(key)
        means = [v.estimates[key].mean for v in self.variants if key in v.estimates]
        if base is None or not means:
            return None
        gain = base - min(means) if metric_of(key).lower_is_better else max(means) - base
        return self._margin * gain if gain > 0 else None

    def _pair(
        self, metric: Metric, first: str, second: str, margin: float | None
    ) -> Difference | None:
        """First minus second over the seeds that both finished; ``None`` where untested."""
        mine, theirs = (
            {value["member"]["seed"]: value for value in self._scores[label]}
            for label in (first, second)
        )
        seeds = sorted(mine.keys() & theirs.keys())
        scores = [
            self._scores_of([side[s] for s in seeds], metric.source) for side in (mine, theirs)
        ]
        paired = _paired(*scores)
        if paired is None:
            return None
        one = interval(paired, margin=margin)
        if one.p is None or one.low is None or one.high is None:
            return None
        return Difference(
            metric=metric.key,
            first=first,
            second=second,
            difference=one.mean,
            low=one.low,
            high=one.high,
            p=one.p,
            p_holm=one.p,
            significant=False,
            words="",
            margin=margin,
            p_equivalence=one.p_equivalence,
            by_seed=paired.seed_means().tolist(),
            seeds=seeds,
        )

    # -- the rest --------------------------------------------------------------------------

    def samples(
        self, prompts: Sequence[GenerationPrompt], tokenizer: Tokenizer
    ) -> list[ComparedSample]:
        """A few prompts with every setting's answer, of its first finished seed."""
        answers = self._base.get("answers", [])
        places = range(0, len(answers), max(1, len(answers) // SAMPLES))
        return [
            ComparedSample(
                prompt=tokenizer.decode(prompts[place].prompt_ids, skip_special_tokens=True),
                reference=prompts[place].answer,
                base=answers[place],
                answers={k: values[0]["answers"][place] for k, values in self._scores.items()},
            )
            for place in places[:SAMPLES]
        ]

    def base(self, path: str, fingerprint: str, parameters: int) -> BaseScores:
        """The base model's own scores."""
        run = build(SeedRun, self._base["member"])
        heldout = self._base.get("heldout")
        return BaseScores(
            path=path,
            fingerprint=fingerprint,
            parameters=parameters,
            loss=run.loss,
            token_accuracy=run.token_accuracy,
            exact_match=run.exact_match,
            heldout_loss=sum(heldout["loss"]) / sum(heldout["tokens"]) if heldout else None,
            text=self._text_values(self._base),
        )


def _paired(
    one: Scores | TextScores | None, other: Scores | TextScores | None
) -> Scores | TextScores | None:
    """First minus second, where both were measured."""
    if isinstance(one, TextScores) and isinstance(other, TextScores):
        return one.minus(other)
    if isinstance(one, Scores) and isinstance(other, Scores):
        return one.minus(other)
    return None


def _whole_failure(trials: Sequence[Trial], runs: Sequence[SeedRun], unsearched: bool) -> str:
    if unsearched:
        reasons = {trial.reason for trial in trials if trial.reason}
        return f"no learning rate was usable: {'; '.join(sorted(reasons))}"
    if runs and all(run.reason for run in runs):
        return f"every seed failed: {runs[0].reason}"
    return ""


def _common_target(variants: Sequence[VariantResult]) -> float | None:
    """The dev loss that every finished training reaches: the highest of their last ones."""
    ends = [run.curve[-1].dev_loss for v in variants for run in v.members if run.curve]
    return max((loss for loss in ends if loss is not None), default=None)


def _steps_to(run: SeedRun, target: float | None) -> float | None:
    """When the dev loss first falls to ``target``, on straight lines between measurements."""
    if target is None:
        return None
    points = [(p.step, p.dev_loss) for p in run.curve if p.dev_loss is not None]
    for (start, before), (end, after) in itertools.pairwise(points):
        if after <= target:
            share = (before - target) / (before - after) if before > after else 0.0
            return start + min(1.0, max(0.0, share)) * (end - start)
    return None


def _estimate(one: Interval, seeds: int, units: int) -> Estimate:
    return Estimate(mean=one.mean, low=one.low, high=one.high, seeds=seeds, units=units)


def _corrected(pairs: Sequence[Difference]) -> list[Difference]:
    """All pairs of a metric, their p-values corrected for the number of pairs, and in words."""
    differ = holm([one.p for one in pairs])
    equal = holm([1.0 if one.p_equivalence is None else one.p_equivalence for one in pairs])
    corrected = []
    for one, p, p_equal in zip(pairs, differ, equal, strict=True):
        tested = one.p_equivalence is not None
        judged = replace(
            one,
            p_holm=p,
            significant=p < SIGNIFICANT,
            p_equivalence=p_equal if tested else None,
            equivalent=tested and p_equal < SIGNIFICANT,
        )
        corrected.append(replace(judged, words=difference_in_words(judged)))
    return corrected
