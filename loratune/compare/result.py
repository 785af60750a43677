"""The content of ``comparison.json``: plain dataclasses, readable without torch.

Losses are in nats per token, memory in bytes, times in seconds, shares between 0 and 1.
``None`` means not measured (no prompts to answer, no held-out text, target never reached).
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

Kind = TypeVar("Kind")
FORMAT = "loratune-comparison"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one setting costs before any training: closed forms, and one measured block.

    Attributes:
        rank: width of the bottleneck.
        trainable: numbers that training changes.
        frozen: numbers of the adapter that stay at their random start.
        percent_of_base: ``trainable`` over the base model's parameters, in percent.
        stored_bytes: the adapter file, without its header.
        optimizer_bytes: AdamW's two fp32 moments.
        activation_bytes_per_token: what autograd keeps because of the adapters, all blocks.
        base_activation_bytes_per_token: what it keeps for the frozen base anyway, all blocks.
    """

    rank: int
    trainable: int
    frozen: int
    percent_of_base: float
    stored_bytes: int
    optimizer_bytes: int
    activation_bytes_per_token: float | None = None
    base_activation_bytes_per_token: float | None = None


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Where a training stood after ``step`` steps.

    Attributes:
        tokens: supervised tokens seen.
        seconds: time spent in steps, evaluations left out.
        train_loss: mean over the steps since the point before; ``None`` before the first step.
        dev_loss: on the search split.
        heldout_loss: on held-out text, where ``compare.target_loss`` is set.
    """

    step: int
    tokens: int
    seconds: float
    train_loss: float | None
    dev_loss: float | None
    heldout_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of the learning-rate search, trained for ``steps`` steps from scratch.

    Attributes:
        lr: learning rate.
        lr_ratio: LoRA+'s ratio, for variants that have one.
        steps: how long it was trained.
        loss: on the search split; ``None`` if it failed.
        reason: why it failed, or an empty string.
    """

    lr: float
    lr_ratio: float | None
    steps: int
    loss: float | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class SeedRun:
    """One final training: one setting, one seed.

    Attributes:
        seed: of initialisation, data order and dropout.
        order: sha256 of the row numbers of every step: equal for all variants of a seed.
        reason: why it failed, or an empty string; a failed run has no numbers.
        loss: on the final rows.
        token_accuracy: share of supervised tokens ranked first, final rows.
        exact_match: share of prompts answered exactly.
        forgetting: loss on held-out text minus the base model's.
        forgetting_at_target: the same where the dev loss reached ``compare.target_loss``.
        text: name of every other metric of ``evaluate.metrics`` to its value.
        step_seconds: median time of a step.
        peak_bytes: largest allocation during one training step: base, adapter, gradients,
            optimizer state, activations.
        steps_to_target: steps until the dev loss reached the comparison's target.
        seconds_to_target: the same in seconds of steps.
        merge_residual: largest relative difference between W' - W and the correction.
        curve: losses along the way.
    """

    seed: int
    order: str = ""
    reason: str = ""
    loss: float | None = None
    token_accuracy: float | None = None
    exact_match: float | None = None
    forgetting: float | None = None
    forgetting_at_target: float | None = None
    text: dict[str, float] = field(default_factory=dict)
    step_seconds: float | None = None
    peak_bytes: int | None = None
    steps_to_target: float | None = None
    seconds_to_target: float | None = None
    merge_residual: float | None = None
    curve: list[CurvePoint] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % confidence interval.

    Attributes:
        seeds: trainings behind it.
        units: prompts (or texts) behind it; 0 where only seeds vary.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    units: int = 0


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A contender that is another one's training under a name of its own, up to rounding.

    Attributes:
        label: its name.
        of: the contender that it is.
        rate_factor: at a learning rate, it is the other at so many times this rate.
        but: settings that keep the two trainings apart; empty where nothing does.
        trained: whether it was trained all the same.
    """

    label: str
    of: str
    rate_factor: float
    but: list[str] = field(default_factory=list)
    trained: bool = True


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """One setting under comparison.

    Attributes:
        label: its name in tables; unique in the comparison.
        variant: the adapter variant.
        overrides: what it changes of the recipe, as it was asked for.
        changes: of these, what lies outside the adapter, by dotted names.
        steps: of its final trainings, where they are not the comparison's.
        adapter: all its settings, with the chosen learning rate.
        lr: the chosen learning rate; ``None`` if no rate was usable.
        lr_ratio: the chosen ratio, for variants that have one.
        search: every trial of the search.
        members: one per seed.
        estimates: metric name to mean and interval over the runs that succeeded: ``loss``,
            ``token_accuracy``, ``exact_match``, ``forgetting``, ``step_seconds``, ``peak_bytes``,
            ``steps_to_target``, ``seconds_to_target``, ``forgetting_at_target``,
            ``merge_residual``, and the comparison's ``text_metrics``; absent if unmeasured.
        reason: why the whole setting failed, or an empty string.
        notes: what to know about it, one sentence each.
    """

    label: str
    variant: str
    adapter: dict[str, Any]
    costs: Costs
    lr: float | None = None
    lr_ratio: float | None = None
    search: list[Trial] = field(default_factory=list)
    members: list[SeedRun] = field(default_factory=list)
    estimates: dict[str, Estimate] = field(default_factory=dict)
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """``first`` minus ``second`` in one metric, paired by prompt and seed.

    Attributes:
        low: lower end of the 95 % interval (not corrected for the number of pairs).
        high: upper end.
        p: two-sided p-value.
        p_holm: the same after Holm's correction over all pairs of the metric.
        significant: ``p_holm`` is below 0.05.
        words: the finding as a sentence.
        margin: what counts as no difference in this metric; ``None`` where nothing says so.
        p_equivalence: of the two one-sided tests that the difference is beyond the margin, the
            larger p-value, after Holm's correction over all pairs of the metric.
        equivalent: ``p_equivalence`` is below 0.05.
        by_seed: the difference for each seed that both finished, in the order of ``seeds``.
        seeds: these seeds.
    """

    metric: str
    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    significant: bool
    words: str
    margin: float | None = None
    p_equivalence: float | None = None
    equivalent: bool = False
    by_seed: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ComparedSample:
    """One prompt of the final rows with every setting's answer (first seed)."""

    prompt: str
    reference: str
    base: str
    answers: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class BaseScores:
    """The base model, unadapted, on the same rows.

    Attributes:
        path: what the recipe called it.
        fingerprint: sha256 over its weights.
        parameters: numbers in it.
    """

    path: str
    fingerprint: str
    parameters: int
    loss: float | None = None
    token_accuracy: float | None = None
    exact_match: float | None = None
    heldout_loss: float | None = None
    text: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How many rows each part of the comparison used, and where they came from.

    Attributes:
        train: rows trained on.
        dev: rows of the search and of the curves; never among ``test``.
        test: rows of the final numbers.
        prompts: distinct prompts among ``test``.
        heldout: texts that forgetting is measured on.
        sources: part to the path it was read from.
        notes: what to know about them, one sentence each.
        fingerprints: part to the sha256 of its rows.
    """

    train: int
    dev: int
    test: int
    prompts: int
    heldout: int = 0
    sources: dict[str, str] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that ``comparison.json`` says.

    Attributes:
        name: of the recipe.
        created: UTC time of writing, ISO 8601.
        seconds: time spent in all trials and runs together, over all processes.
        match: ``own``, ``rank``, ``trainable`` or ``bytes``, with the budget where there is one.
        steps: optimizer steps of every final training.
        seeds: the seeds trained.
        target_loss: dev loss of the time-to-target columns.
        text_metrics: those of ``evaluate.metrics``, besides exact match.
        variants: in the order asked for.
        differences: every pair in every metric that has an interval.
        margin: share of the best one's gain over the base below which a difference counts as none.
        twins: contenders that are one training, or nearly.
        findings: which variant to choose, how sure that is, and what limits it.
        recipe: the resolved recipe.
        provenance: versions, machine, device.
    """

    name: str
    created: str
    seconds: float
    match: str
    steps: int
    seeds: list[int]
    target_loss: float | None
    base: BaseScores
    rows: Rows
    variants: list[VariantResult]
    text_metrics: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    margin: float = 0.01
    twins: list[Twin] = field(default_factory=list)
    samples: list[ComparedSample] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the format's name and version."""
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: for another format or version, a missing key or a value of the wrong kind.
        """
        if values.get("format") != FORMAT or values.get("version") != VERSION:
            raise ValueError(f"not a {FORMAT} of version {VERSION}")
        fields = {key: value for key, value in values.items() if key not in ("format", "version")}
        return build(cls, fields)


def build(kind: type[Kind], value: Any) -> Kind:
    """``value``, as JSON gives it, as an object of the dataclass ``kind``.

    Raises:
        ValueError: if a key is missing or unknown, or a value is of the wrong kind.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is not a {kind.__name__}")
    hints = typing.get_type_hints(kind)
    unknown = value.keys() - hints.keys()
    if unknown:
        raise ValueError(f"{kind.__name__} has no {', '.join(sorted(map(str, unknown)))}")
    try:
        return kind(**{key: _typed(hints[key], item) for key, item in value.items()})
    except TypeError as error:
        raise ValueError(str(error)) from error


def _typed(kind: Any, value: Any) -> Any:
    """``value`` checked against a type hint, with dataclasses built inside it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return build(kind, value)
    if origin is types.UnionType:
        return None if value is None else _typed(arguments[0], value)
    if origin is list and isinstance(value, list):
        return [_typed(arguments[0], item) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _typed(arguments[1], item) for key, item in value.items()}
    accepted = (int, float) if kind is float else origin or kind
    if kind is Any or (isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)):
        return value
    raise ValueError(f"{value!r} is not {kind}")
