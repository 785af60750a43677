"""Which values a recipe's settings may have, and which settings contradict each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from operator import attrgetter
from typing import Any

from loratune.config.mixture import SOURCES, source_problems
from loratune.config.schema import Quantize, RunConfig, Stage
from loratune.errors import ConfigError
from loratune.scoring.registry import EXACT_MATCH
from loratune.units import parse_bytes

Check = tuple[Callable[[Any], bool], str]
"""Whether a value is allowed, and the advice if it is not."""


def check_values(config: RunConfig) -> list[ConfigError]:
    """Every value out of range and every contradiction, one error each."""
    out_of_range = [
        ConfigError(f"{value or repr(value)} is out of range", where=key, fix=advice)
        for key, (is_allowed, advice) in _RANGES.items()
        if (value := attrgetter(key)(config)) is not None and not is_allowed(value)
    ]
    return [*out_of_range, *_contradictions(config), *config.adapter.useless_settings()]


def _at_least(least: float, advice: str = "") -> Check:
    return lambda value: math.isfinite(value) and value >= least, advice or f"use >= {least}"


def _above(bound: float) -> Check:
    return lambda value: math.isfinite(value) and value > bound, f"use a number above {bound}"


_ROWS = _at_least(1, "use >= 1, or null for all rows")
_NOT_NEGATIVE = _at_least(0, "use a number >= 0")
_FEW: Check = (lambda value: 1 <= value <= 64, "use 1 to 64")

_RANGES: dict[str, Check] = {
    "data.max_length": _at_least(2),
    "data.eval_fraction": (lambda value: 0 <= value < 1, "use [0, 1)"),
    "data.limit": _ROWS,
    "data.eval_limit": _ROWS,
    "data.share_prefixes": (
        lambda value: value in ("auto", True, False),
        "use auto, true or false",
    ),
    "data.cache": (bool, "name a folder, or null for none"),
    "trainer.batch_size": _at_least(1),
    "trainer.grad_accum_steps": _at_least(1),
    "trainer.log_every": _at_least(1),
    "trainer.keep_checkpoints": _at_least(1),
    "trainer.warmup_steps": _NOT_NEGATIVE,
    "trainer.warmup_ratio": (lambda value: 0 <= value < 1, "use [0, 1)"),
    "trainer.weight_decay": _NOT_NEGATIVE,
    "trainer.clip_norm": _NOT_NEGATIVE,
    "trainer.eval_every": _NOT_NEGATIVE,
    "trainer.save_every": _NOT_NEGATIVE,
    "trainer.early_stop_patience": _NOT_NEGATIVE,
    "trainer.seed": _NOT_NEGATIVE,
    "trainer.steps": _above(0),
    "trainer.epochs": _above(0),
    "trainer.lr": _NOT_NEGATIVE,
    "trainer.lr_scale": _NOT_NEGATIVE,
    "trainer.eps": _NOT_NEGATIVE,
    "trainer.betas": (
        lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "use two numbers in [0, 1)",
    ),
    "compare.dev_fraction": (
        lambda value: 0 < value < 1,
        "use a number between 0 and 1: without dev rows nothing can be chosen",
    ),
    "compare.seeds": _FEW,
    "compare.lr_points": _FEW,
    "compare.rungs": _FEW,
    "compare.lr_factor": _above(1),
    "compare.steps": _at_least(1),
    "compare.target_loss": (math.isfinite, "use a number"),
    "gate.min_gain": (math.isfinite, "use a number"),
    "gate.max_forgetting": (math.isfinite, "use a number, or null for any"),
    "gate.max_bytes": (lambda value: parse_bytes(value) is not None, "use a size, such as 5MB"),
    "compare.margin": (
        lambda value: 0 < value < 1,
        "use a share between 0 and 1: only a margin above 0 can show that two are equal",
    ),
    "launch.nproc": _at_least(1),
    "launch.max_restarts": _NOT_NEGATIVE,
    "launch.timeout": _at_least(1),
}
"""Settings with a range; null is allowed wherever the type allows it."""


def _contradictions(config: RunConfig) -> Iterator[ConfigError]:
    """What single values do not show: settings that need, or exclude, one another."""
    trainer, data = config.trainer, config.data
    trains = Stage.train in config.stages
    has_eval = data.eval_path is not None or data.eval_fraction > 0
    if data.sources is not None:
        yield from source_problems([asdict(source) for source in data.sources])
        if data.path is not None:
            cause = f"data.path and {SOURCES} exclude each other"
            fix = "add data.path=null (it can be one of the sources), or remove the sources"
            yield ConfigError(cause, where="data", fix=fix)
    if trainer.steps is not None and trainer.epochs is not None:
        cause = "trainer.steps and trainer.epochs exclude each other"
        yield ConfigError(cause, where="trainer", fix="set one of them, the other to null")
    if trains and trainer.steps is None and trainer.epochs is None:
        fix = "set trainer.steps or trainer.epochs"
        yield ConfigError("no length is set", where="trainer", fix=fix)
    if trains and trainer.eval_every and not has_eval:
        cause = "trainer.eval_every is set but there is nothing to evaluate on"
        fix = "set data.eval_path or data.eval_fraction, or trainer.eval_every=0"
        yield ConfigError(cause, where="trainer.eval_every", fix=fix)
    yield from _unmeasured(config)
    if trainer.early_stop_patience and not trainer.eval_every:
        key = "trainer.early_stop_patience"
        cause = f"{key} has no effect without trainer.eval_every"
        yield ConfigError(cause, where=key, fix="set trainer.eval_every")
    yield from _quantization(config)
    if not trains and config.adapter_path is None:
        cause = f"stages {[str(stage) for stage in config.stages]} need an adapter and train none"
        fix = "add train to stages, or set adapter_path=DIR"
        yield ConfigError(cause, where="stages", fix=fix)
    if not _is_folder_name(config.name):
        fix = "use a plain name: no /, no leading dot, dash or space, at most 100 characters"
        yield ConfigError(f"{config.name!r} cannot name a folder", where="name", fix=fix)


def _quantization(config: RunConfig) -> Iterator[ConfigError]:
    """What ``model.quantize`` needs and excludes."""
    model, kind = config.model, config.model.quantize
    if model.quantize_double and kind not in (Quantize.nf4, Quantize.fp4):
        cause = "model.quantize_double has no effect without 4-bit blocks"
        yield ConfigError(cause, where="model.quantize_double", fix="set model.quantize=nf4")
    if kind is None:
        if model.quantize_skip:
            cause = "model.quantize_skip has no effect without model.quantize"
            yield ConfigError(cause, where="model.quantize_skip", fix="set model.quantize=nf4")
        return
    if reason := config.adapter.why_not_quantized():
        cause = f"{config.adapter.variant} cannot adapt a quantized base: {reason}"
        fix = "choose another variant (adapter=...), or model.quantize=null"
        yield ConfigError(cause, where=f"model.quantize={kind}", fix=fix)
    if config.launch.shard:
        cause = "a quantized base cannot be sharded"
        yield ConfigError(cause, where="launch.shard", fix="launch.shard=false")


def _unmeasured(config: RunConfig) -> Iterator[ConfigError]:
    """What is asked of an evaluation that measures no answers, or no base."""
    asked = [name for name in config.evaluate.metrics if name != EXACT_MATCH]
    if asked and not config.evaluate.generate:
        cause = f"{', '.join(asked)} needs answers, and evaluate.generate is false"
        yield ConfigError(cause, where="evaluate.metrics", fix="set evaluate.generate=true")
    if config.evaluate.retention and not config.evaluate.base:
        cause = "forgetting is measured against the base, and evaluate.base is false"
        yield ConfigError(cause, where="evaluate.retention", fix="set evaluate.base=true")


def _is_folder_name(name: str) -> bool:
    """Whether a name stays in its folder and can be shown: it may come from anybody's recipe."""
    return (
        0 < len(name) <= 100
        and name.isprintable()
        and not set(name) & {"/", "\\"}
        and name[0] not in ".-"
        and name == name.strip()
    )
