"""From finished pieces to a comparison: means, intervals, differences, findings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from loratune.compare.plan import FAILED, SECONDS, ComparisonPlan, Contest, Work
from loratune.compare.result import (
    BaseScores,
    ComparedSample,
    Costs,
    Difference,
    Estimate,
    Member,
    Trial,
    VariantResult,
    build,
)
from loratune.compare.statistics import SIGNIFICANT, Interval, Scores, holm, interval, over_seeds
from loratune.compare.store import Store
from loratune.compare.words import METRICS, difference_in_words
from loratune.config.convert import to_plain

SAMPLES = 6
_OVER_SEEDS = (
    "step_seconds",
    "peak_bytes",
    "steps_to_target",
    "seconds_to_target",
    "merge_residual",
)


class Assembly:
    """What the pieces of a comparison come to.

    Attributes:
        variants: the contenders' results.
        differences: every pair in every metric.
        target_loss: dev loss of the time-to-target columns.
    """

    def __init__(self, plan: ComparisonPlan, store: Store, target_loss: float | None) -> None:
        self._store = store
        self._base = store.read(plan.base().piece) or {}
        self._scores: dict[str, list[dict[str, Any]]] = {}
        found = [self._variant(plan, contest) for contest in plan.contests]
        self.target_loss = target_loss if target_loss is not None else _common_target(found)
        self.variants = [self._with_estimates(variant) for variant in found]
        self.differences = self._differences()

    # -- one variant -----------------------------------------------------------------------

    def _variant(self, plan: ComparisonPlan, contest: Contest) -> VariantResult:
        store, contender = self._store, contest.contender
        results = plan.results(contest, store)
        point = contest.search.winner(results)
        notes = list(contender.notes)
        if point is not None and contest.search.is_at_edge(point, results):
            notes.append(
                f"its best rate, {point.lr:g}, is the last one tried: give a wider lr_grid"
            )
        members = [self._member(work) for work in plan.members(contest, store)]
        costs: Costs = build(Costs, _without_seconds(store.read(plan.costs(contender).piece)))
        return VariantResult(
            label=contender.label, variant=contender.config.variant, costs=costs,
            adapter=to_plain(point.applied(contender.config) if point else contender.config),
            lr=point.lr if point else None, lr_ratio=point.ratio if point else None,
            search=[trial for _, trial in sorted(results.items(), key=lambda item: item[0][1])],
            members=members, reason=_whole_failure(list(results.values()), members, point is None),
            notes=notes,
        )  # fmt: skip

    def _member(self, work: Work) -> Member:
        value = self._store.read(work.piece) or {FAILED: "not finished"}
        if FAILED in value:
            return Member(seed=work.seed, reason=value[FAILED])
        assert work.contender is not None
        self._scores.setdefault(work.contender.label, []).append(value)
        member: Member = build(Member, value["member"])
        scores = self._scores_of([value], "heldout")
        if scores is None:
            return member
        return replace(member, forgetting=interval(scores, resamples=1).mean)

    def _with_estimates(self, variant: VariantResult) -> VariantResult:
        members = [self._on_target(member) for member in variant.members]
        good = [member for member in members if not member.reason]
        estimates: dict[str, Estimate] = {}
        for metric in METRICS:
            scores = self._scores_of(self._scores.get(variant.label, []), metric.source)
            if scores is not None:
                estimates[metric.key] = _estimate(interval(scores), scores)
        for key in _OVER_SEEDS:
            values = [getattr(member, key) for member in good]
            known = [float(value) for value in values if value is not None]
            if known:
                estimates[key] = _estimate(over_seeds(known), Scores([[v] for v in known], []))
        return replace(variant, members=members, estimates=estimates)

    def _on_target(self, member: Member) -> Member:
        steps = _reached(member, self.target_loss, lambda point: float(point.step))
        if steps is None:
            return member
        seconds = None if member.step_seconds is None else steps * member.step_seconds
        return replace(member, steps_to_target=steps, seconds_to_target=seconds)

    # -- scores ----------------------------------------------------------------------------

    def _scores_of(self, values: Sequence[dict[str, Any]], source: str) -> Scores | None:
        """One metric of several members, unit by unit; ``None`` where it was not measured."""
        if not values:
            return None
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
        found: list[Difference] = []
        labels = [variant.label for variant in self.variants if variant.label in self._scores]
        for metric in METRICS:
            pairs = [
                (first, second, self._pair(first, second, metric.source))
                for first, second in itertools.combinations(labels, 2)
            ]
            known = [(a, b, i) for a, b, i in pairs if i is not None and i.p is not None]
            adjusted = holm([i.p for _, _, i in known if i.p is not None])
            for (first, second, one), p_holm in zip(known, adjusted, strict=True):
                found.append(_difference(metric.key, first, second, one, p_holm))
        return found

    def _pair(self, first: str, second: str, source: str) -> Interval | None:
        """First minus second over the seeds that both finished."""
        mine, theirs = (
            {value["member"]["seed"]: value for value in self._scores[label]}
            for label in (first, second)
        )
        seeds = sorted(mine.keys() & theirs.keys())
        scores = [self._scores_of([side[s] for s in seeds], source) for side in (mine, theirs)]
        if scores[0] is None or scores[1] is None:
            return None
        return interval(scores[0].minus(scores[1]))

    # -- the rest --------------------------------------------------------------------------

    def samples(self, prompts: Sequence[str], references: Sequence[str]) -> list[ComparedSample]:
        """A few prompts with every contender's answer, of its first finished seed."""
        answered = len(self._base.get("answers", []))
        step = max(1, answered // SAMPLES)
        return [
            ComparedSample(
                prompt=prompts[place], reference=references[place],
                base=self._base["answers"][place],
                answers={k: values[0]["answers"][place] for k, values in self._scores.items()},
            )
            for place in range(0, answered, step)
        ][:SAMPLES]  # fmt: skip

    def base(self, path: str, fingerprint: str, parameters: int) -> BaseScores:
        """The base model's own scores."""
        member: Member = build(Member, self._base["member"])
        heldout = self._base.get("heldout")
        return BaseScores(
            path=path, fingerprint=fingerprint, parameters=parameters, loss=member.loss,
            token_accuracy=member.token_accuracy, exact_match=member.exact_match,
            heldout_loss=sum(heldout["loss"]) / sum(heldout["tokens"]) if heldout else None,
        )  # fmt: skip


def _without_seconds(value: dict[str, Any] | None) -> dict[str, Any]:
    return {key: item for key, item in (value or {}).items() if key != SECONDS}


def _whole_failure(trials: Sequence[Trial], members: Sequence[Member], unsearched: bool) -> str:
    if unsearched:
        reasons = {trial.reason for trial in trials if trial.reason}
        return f"no learning rate was usable: {'; '.join(sorted(reasons))}"
    if members and all(member.reason for member in members):
        return f"every seed failed: {members[0].reason}"
    return ""


def _common_target(variants: Sequence[VariantResult]) -> float | None:
    """The dev loss that every finished training reaches: the highest of their last ones."""
    ends = [member.curve[-1].dev_loss for v in variants for member in v.members if member.curve]
    return max((loss for loss in ends if loss is not None), default=None)


def _reached(member: Member, target: float | None, of: Callable[[Any], float]) -> float | None:
    """Where the dev loss first falls to ``target``, on straight lines between measurements."""
    if target is None:
        return None
    points = [point for point in member.curve if point.dev_loss is not None]
    for before, after in itertools.pairwise(points):
        assert before.dev_loss is not None and after.dev_loss is not None
        if after.dev_loss <= target:
            drop = before.dev_loss - after.dev_loss
            share = (before.dev_loss - target) / drop if drop > 0 else 0.0
            return of(before) + min(1.0, max(0.0, share)) * (of(after) - of(before))
    return None


def _estimate(one: Interval, scores: Scores) -> Estimate:
    return Estimate(
        mean=one.mean, low=one.low, high=one.high, seeds=len(scores.sums), units=len(scores.weights)
    )


def _difference(metric: str, first: str, second: str, one: Interval, p_holm: float) -> Difference:
    assert one.low is not None and one.high is not None and one.p is not None
    made = Difference(
        metric=metric, first=first, second=second, difference=one.mean, low=one.low, high=one.high,
        p=one.p, p_holm=p_holm, significant=p_holm < SIGNIFICANT, words="",
    )  # fmt: skip
    return replace(made, words=difference_in_words(made))
