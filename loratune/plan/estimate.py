"""A recipe's steps, memory, disk and time, and what is doubtful, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from loratune import files
from loratune.config.schema import Dtype, RunConfig, Stage
from loratune.counting.parameters import FP32_BYTES
from loratune.data.findings import Severity
from loratune.models.dtypes import ITEM_BYTES, safetensors_name
from loratune.models.measure import find_architecture
from loratune.plan.calibration import calibrate
from loratune.plan.compiling import compile_advice
from loratune.plan.fit import fitted
from loratune.plan.memory import ERROR_BAR, Memory, available_bytes, block_count
from loratune.plan.model_checks import check_model
from loratune.plan.plan import Disk, Plan, Time
from loratune.plan.setting import Setting, find_setting
from loratune.plan.sources import SourcedValue
from loratune.plan.workload import Rows, Workload, read_workload_rows, workload
from loratune.training.optim import learning_rate, warmup_warning
from loratune.units import byte_size

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
    architecture = find_architecture(config.model)
    model = check_model(config, architecture, rows)
    work = workload(config, rows, model.arrangement)
    setting = find_setting(config, architecture, tokens=min(work.largest.rows_alone[1], 256))
    overrides: tuple[str, ...] = ()
    if fit is not None:
        config, rows, work, overrides = fitted(config, rows, work, setting, model, fit)
    memory, disk = setting.memory(config, work), _disk(config, setting)
    time = _time(config, setting, work) if timed and setting.is_here else None
    doubts = tuple(_warnings(config, rows, work, setting, memory, disk))
    if time is not None and time.doubt is not None:
        doubts += (time.doubt,)
    estimate = (setting, work, memory, disk, time)
    notes = (*_notes(work, setting), *model.notes)
    return Plan(config.name, tuple(values), *estimate, doubts, overrides, fit, notes)


def _time(config: RunConfig, setting: Setting, work: Workload) -> Time:
    speed = calibrate(setting.architecture, config, work.largest, setting.dtype, setting.device)
    blocks = block_count(setting.architecture)
    factor = _RECOMPUTED if config.trainer.gradient_checkpointing else 1.0
    block, head, compiling = speed.block, work.supervised * speed.head, 0.0
    training = work.tokens * blocks * block * factor + head
    doubt = None
    if speed.compiled is not None:
        block, compiling = speed.compiled.block, speed.compiled.compiling * blocks
        faster = work.tokens * blocks * block * factor + head
        doubt = compile_advice(training, faster, compiling, work.steps)
        training = faster
    every = config.trainer.eval_every
    passes = (work.steps // every if every else 0) + 2 * (Stage.evaluate in config.stages)
    evaluation = passes * work.evaluation_tokens * blocks * block * _FORWARD_SHARE
    rate = work.tokens / training if training else 0.0
    return Time(training + compiling, evaluation, rate, speed.tokens, doubt)


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


def _notes(work: Workload, setting: Setting) -> Iterator[str]:
    """What training says as well, and nobody need change."""
    yield from setting.notices
    for found in work.audit.of(Severity.note) if work.audit is not None else ():
        yield found.line.removeprefix("note: ")


def _warnings(
    config: RunConfig, rows: Rows, work: Workload, setting: Setting, memory: Memory, disk: Disk
) -> list[str]:
    """One line for each thing worth changing, or knowing, before the run starts."""
    warnings = list(config.adapter.warnings())
    if work.assumed:
        warnings.append(work.assumed)
    if work.audit is not None:
        warnings += [one.line for one in work.audit.of(Severity.warning)]
    warnings += _capacity(memory, setting, disk)
    trainer = config.trainer
    warnings += filter(None, [warmup_warning(work.steps, trainer)])
    seen = work.times_seen or ({} if work.epochs is None else {"": work.epochs})
    for name, times in seen.items():
        if times > 10:
            of = f" of source {name}" if name else ""
            warnings.append(f"{times:.0f} passes over the same rows{of}: they will be memorised")
    if learning_rate(trainer, config.adapter) == 0:
        warnings.append("the learning rate is 0: nothing will train")
    if not trainer.save_every and work.steps >= 1000:
        warnings.append("trainer.save_every is 0: a crash loses the whole run")
    if not trainer.eval_every and rows.data is not None and rows.data.eval:
        warnings.append("trainer.eval_every is 0: the last adapter is kept, not the best")
    return warnings


def _capacity(memory: Memory, setting: Setting, disk: Disk) -> list[str]:
    warnings = []
    available = available_bytes(setting.device) if setting.is_here else None
    wanted = memory.peak - memory.process
    if available is not None and wanted * (1 + ERROR_BAR) > available:
        fix = f"try fit={available / 1e9:.1f}GB"
        warnings.append(
            f"{byte_size(available)} are free here, and {byte_size(wanted)} may be needed: {fix}"
        )
    if not setting.is_here:
        warnings.append("no such device is here: memory is computed, time is not known")
    if disk.total > disk.free:
        warnings.append(
            f"the disk has {byte_size(disk.free)} free, and {byte_size(disk.total)} are needed"
        )
    return warnings
