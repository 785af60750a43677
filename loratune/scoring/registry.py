"""Metrics by name: the built-in ones, those of installed packages, and those a program adds.

A recipe is data and names a metric, never code.  A package brings one of its own as an entry point,

    [project.entry-points."loratune.metrics"]
    length_ratio = "my_package:length_ratio"

where ``length_ratio(answer, references)`` returns a number, or is a ``TextMetric``; a program calls
``loratune.register_metric("length_ratio", length_ratio)``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any

from loratune.errors import ConfigError, choose_one, raise_together
from loratune.scoring.metric import AnswerScore, MeanMetric, TextMetric

EXACT_MATCH = "exact_match"
GROUP = "loratune.metrics"
_KEY = "evaluate.metrics"


@dataclass(frozen=True)
class _BuiltIn:
    """A metric made on demand, since another package computes it.

    Attributes:
        label: in tables and sentences.
        maker: ``module:function``.
        package: what must be importable, and the name under which it is installed.
    """

    label: str
    maker: str
    package: str = ""

    def make(self) -> TextMetric:
        module, _, function = self.maker.partition(":")
        make: Callable[[], TextMetric] = getattr(importlib.import_module(module), function)
        return make()


def _exact_match() -> TextMetric:
    def hit(answer: str, references: Sequence[str]) -> float:
        return float(answer in references)

    return MeanMetric(EXACT_MATCH, hit, is_share=True)


_BUILT_IN = {
    EXACT_MATCH: _BuiltIn("exact match", "loratune.scoring.registry:_exact_match"),
    "bleu": _BuiltIn("BLEU", "loratune.scoring.sacrebleu_metrics:bleu", "sacrebleu"),
    "chrf": _BuiltIn("chrF", "loratune.scoring.sacrebleu_metrics:chrf", "sacrebleu"),
    "rouge_l": _BuiltIn("ROUGE-L", "loratune.scoring.rouge_metrics:rouge_l", "rouge_score"),
}
_registered: dict[str, TextMetric] = {}


def register_metric(name: str, metric: TextMetric | AnswerScore, label: str = "") -> None:
    """Let ``evaluate.metrics`` name a metric of one's own, in this process.

    Args:
        name: as ``evaluate.metrics`` will have it.
        metric: a ``TextMetric``, or a function of an answer and its references whose mean is taken.
        label: in tables; by default the name.

    Raises:
        ConfigError: if a built-in metric has that name.
    """
    if name in _BUILT_IN:
        raise ConfigError(f"'{name}' is built in", where="register_metric", fix="use another name")
    made = metric if isinstance(metric, TextMetric) else MeanMetric(name, metric, label)
    _registered[name] = made


def metric_label(name: str) -> str:
    """What tables call a metric, whether or not it is installed here."""
    if name in _BUILT_IN:
        return _BUILT_IN[name].label
    return _registered[name].label if name in _registered else name.replace("_", " ")


def text_metrics(names: Iterable[str]) -> list[TextMetric]:
    """The metrics that ``evaluate.metrics`` names.

    Raises:
        ConfigError: for every one that there is not, or whose package is not installed.
    """
    require_metrics(names)
    return [_made(name) for name in dict.fromkeys(names)]


def require_metrics(names: Iterable[str], key: str = _KEY) -> None:
    """Check that every metric exists and that what computes it is installed; imports none of it.

    Args:
        names: of metrics.
        key: the setting that names them.

    Raises:
        ConfigError: one line a metric that is not there.
    """
    raise_together(error for name in dict.fromkeys(names) if (error := _problem(name, key)))


def _problem(name: str, key: str) -> ConfigError | None:
    if name in _registered:
        return None
    if name in _BUILT_IN:
        package = _BUILT_IN[name].package
        if not package or find_spec(package) is not None:
            return None
        return ConfigError(
            f"the metric '{name}' needs the package {package.replace('_', '-')}",
            where=key,
            fix="pip install 'loratune[metrics]'",
        )
    brought = _brought()
    if name in brought:
        return None
    fix = choose_one(name, [*_BUILT_IN, *_registered, *brought])
    return ConfigError(f"there is no metric '{name}'", where=key, fix=fix)


def _brought() -> dict[str, EntryPoint]:
    """Metrics that installed packages bring."""
    return {point.name: point for point in entry_points(group=GROUP)}


def _made(name: str) -> TextMetric:
    if name in _registered:
        return _registered[name]
    if name in _BUILT_IN:
        return _BUILT_IN[name].make()
    point = _brought()[name]
    try:
        metric: Any = point.load()
    except Exception as error:  # a stranger's module may fail in any way
        raise ConfigError(
            f"the metric '{name}' cannot be loaded: {type(error).__name__}: {error}",
            where=f"entry point {point.value}",
            fix="mend or reinstall the package that brings it",
        ) from error
    return metric if isinstance(metric, TextMetric) else MeanMetric(name, metric)
