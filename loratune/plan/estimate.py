"""A recipe's steps, memory, disk and time, before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loratune import files
from loratune.config.schema import Dtype, RunConfig, Stage
from loratune.counting.parameters import FP32_BYTES
from loratune.models.dtypes import ITEM_BYTES, safetensors_name
from loratune.plan.calibration import calibrate
from loratune.plan.fit import fitted
from loratune.plan.memory import block_count
from loratune.plan.plan import Disk, Plan, Time
from loratune.plan.setting import Setting, find_setting
from loratune.plan.sources import SourcedValue
from loratune.plan.warnings import plan_warnings
from loratune.plan.workload import Workload, read_workload_rows, workload

_FORWARD_SHARE = 0.5
"""Of a forward and backward pass through a frozen block: its weights get no gradient."""
_RECOMPUTED = 1.5


def make_plan(
    config: RunConfig, values: Sequence[SourcedValue], fit: int | None = None, *, timed: bool = True
) -> Plan:
    """Estimate what the recipe takes.

    Args:
        config: the recipe.
        values: its settings with their sources, to be shown.
        fit: bytes to stay within: batches, checkpointing and length are chosen for it.
        timed: whether to calibrate on this machine, which takes seconds.

    Raises:
        LoratuneError: a recipe that cannot run; a budget that nothing fits.
    """
    rows = read_workload_rows(config)
    work = workload(config, rows)
    setting = find_setting(config, tokens=min(work.largest.length, 256))
    overrides: tuple[str, ...] = ()
    if fit is not None:
        config, rows, work, overrides = fitted(config, rows, work, setting, fit)
    memory, disk = setting.memory(config, work), _disk(config, setting)
    time = _time(config, setting, work) if timed and setting.is_here else None
    return Plan(
        config.name,
        tuple(values),
        setting,
        work,
        memory,
        disk,
        time,
        tuple(plan_warnings(config, rows, work, setting, memory, disk)),
        overrides,
        fit,
    )


def _time(config: RunConfig, setting: Setting, work: Workload) -> Time:
    speed = calibrate(setting.architecture, config, work.largest, setting.dtype, setting.device)
    blocks = block_count(setting.architecture)
    factor = _RECOMPUTED if config.trainer.gradient_checkpointing else 1.0
    training = work.tokens * blocks * speed.block * factor + work.supervised * speed.head
    every = config.trainer.eval_every
    passes = (work.steps // every if every else 0) + 2 * (Stage.evaluate in config.stages)
    evaluation = passes * work.evaluation_tokens * blocks * speed.block * _FORWARD_SHARE
    rate = work.tokens / training if training else 0.0
    return Time(training, evaluation, rate, speed.tokens)


def _disk(config: RunConfig, setting: Setting) -> Disk:
    count = setting.count
    one = (count.trainable + count.frozen) * FP32_BYTES + count.optimizer_bytes
    trainer = config.trainer
    checkpoints = trainer.keep_checkpoints if trainer.save_every else 1
    checkpoints += bool(trainer.eval_every)  # the best one stays besides
    merged = 0
    if Stage.merge in config.stages:
        dtype = config.merge.dtype
        name = setting.stored if dtype is Dtype.auto else safetensors_name(dtype)
        merged = setting.architecture.base_parameters * ITEM_BYTES[name]
    folder = Path(config.out or "outputs").resolve()
    return Disk(checkpoints * one, count.stored_bytes, merged, files.free_bytes(folder))
