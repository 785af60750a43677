"""A recipe's steps, memory, disk and time, before any weight is read."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune import files
from loratune.config.schema import Dtype, RunConfig, Stage
from loratune.counting.parameters import FP32_BYTES, VariantCount, count_variant, saved_modules
from loratune.data.audit import Severity
from loratune.errors import ConfigError, LoratuneError
from loratune.models.architectures import Architecture
from loratune.models.measure import find_architecture
from loratune.models.source import is_hub_id, model_folder
from loratune.plan.memory import ERROR_BAR, Memory, block_count, predict
from loratune.plan.sources import SourcedValue
from loratune.plan.workload import Rows, Workload, read_workload_rows, workload
from loratune.targets.find import block_of, find_targets
from loratune.training.optim import learning_rate
from loratune.units import byte_size

if TYPE_CHECKING:
    import torch

    from loratune.counting.activations import ActivationReport
    from loratune.plan.calibration import Speed

_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_FORWARD_SHARE = 0.5
"""Of a forward and backward pass through a frozen block: its weights get no gradient."""
_RECOMPUTED = 1.5


@dataclass(frozen=True)
class Disk:
    """Bytes that a run leaves behind.

    Attributes:
        checkpoints: those kept at the same time.
        adapter: the published adapter.
        merged: the merged model, if the recipe merges.
        free: what the file system has, as far as anybody says.
    """

    checkpoints: int
    adapter: int
    merged: int
    free: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.checkpoints + self.adapter + self.merged


@dataclass(frozen=True)
class Time:
    """Expected seconds on this machine, and the trial that they come from."""

    training: float
    evaluation: float
    tokens_per_second: float
    calibrated_on: int


@dataclass(frozen=True)
class Setting:
    """What of a recipe decides its memory, found once."""

    architecture: Architecture
    count: VariantCount
    adapted_blocks: int
    activations: ActivationReport
    dtype: torch.dtype
    device: torch.device
    is_here: bool
    process: int
    stored_bytes: int

    @property
    def bytes_per_weight(self) -> int:
        """Of the base as it is loaded."""
        return int(self.dtype.itemsize)

    def memory(self, config: RunConfig, work: Workload) -> Memory:
        """The peak of this recipe's training."""
        return predict(
            self.architecture,
            self.count,
            self.activations,
            work.largest,
            bytes_per_weight=self.bytes_per_weight,
            adapted_blocks=self.adapted_blocks,
            gradient_checkpointing=config.trainer.gradient_checkpointing,
            process=self.process,
        )


@dataclass(frozen=True)
class Plan:
    """The answer to ``loratune plan``."""

    name: str
    values: tuple[SourcedValue, ...]
    setting: Setting
    work: Workload
    memory: Memory
    disk: Disk
    time: Time | None
    warnings: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    budget: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "name": self.name,
            "values": {v.key: {"value": v.value, "source": v.source} for v in self.values},
            "device": str(self.setting.device),
            "dtype": str(self.setting.dtype).removeprefix("torch."),
            "steps": self.work.steps,
            "epochs": self.work.epochs,
            "tokens": self.work.tokens,
            "supervised_tokens": self.work.supervised,
            "largest_micro_batch": asdict(self.work.largest),
            "data": self.work.report.to_dict() if self.work.report else None,
            "memory": {
                **self.memory.components(), "peak": self.memory.peak, "error_bar": ERROR_BAR,
            },
            "disk": {**asdict(self.disk), "total": self.disk.total},
            "time": asdict(self.time) if self.time else None,
            "warnings": list(self.warnings),
            "fit": {"budget": self.budget, "overrides": list(self.overrides)}
            if self.budget is not None
            else None,
        }  # fmt: skip


def find_setting(config: RunConfig, tokens: int) -> Setting:
    """What decides the recipe's memory; builds one block with random weights.

    Args:
        config: the recipe.
        tokens: length of the sequence that activations are measured on.

    Raises:
        LoratuneError: an unknown model, or targets that match nothing.
    """
    import loratune.pipeline.run  # noqa: F401  what training imports counts as its memory
    from loratune.counting.activations import measure_activations
    from loratune.plan.calibration import resident_bytes

    architecture = find_architecture(config.model)
    matched = find_targets(
        architecture.layers,
        config.targets,
        config.adapter,
        family=architecture.family,
        others=architecture.other_types,
    )
    saved = saved_modules(architecture, config.targets.modules_to_save)
    count = count_variant(architecture.base_parameters, matched.shapes, config.adapter, saved)
    stored = _stored_dtype(config)
    device, dtype, is_here = _device_and_dtype(config, stored)
    measured = measure_activations(
        architecture, config.targets, config.adapter, tokens=tokens, dtype=dtype
    )
    gc.collect()
    process = resident_bytes() if device.type == "cpu" else 0
    return Setting(
        architecture,
        count,
        len({block_of(shape.name) for shape in matched.shapes} - {None}),
        measured,
        dtype,
        device,
        is_here,
        process,
        _BYTES[stored],
    )


def _stored_dtype(config: RunConfig) -> str:
    """Number format of the base's files, from their headers; bf16 where they are not here."""
    from loratune.models.weights import tensor_entries

    if is_hub_id(config.model.path):
        return "BF16"
    try:
        entries = tensor_entries(model_folder(config.model.path, config.model.revision))
    except LoratuneError:
        return "BF16"
    return next((entry.dtype for entry in entries.values() if entry.dtype in _BYTES), "F32")


def _device_and_dtype(config: RunConfig, stored: str) -> tuple[torch.device, torch.dtype, bool]:
    """Where the recipe would run, and whether that is here."""
    import torch

    from loratune.models.load import resolve_device, resolve_dtype

    kinds = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16}
    file_dtype = kinds.get(stored, torch.float16)
    try:
        device, is_here = resolve_device(config.model.device), True
    except ConfigError:
        if not config.model.device.startswith("cuda"):
            raise
        device, is_here = torch.device("cuda"), False
    dtype = resolve_dtype(config.model.dtype, config.trainer.precision, device, file_dtype)
    return device, dtype, is_here


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
    from loratune.plan.fit import fitted

    rows = read_workload_rows(config)
    work = workload(config, rows)
    setting = find_setting(config, tokens=min(work.largest.length, 256))
    overrides: tuple[str, ...] = ()
    if fit is not None:
        config, rows, work, overrides = fitted(config, rows, work, setting, fit)
    speed = _speed(config, setting, work) if timed and setting.is_here else None
    memory, disk = setting.memory(config, work), _disk(config, setting)
    return Plan(
        config.name,
        tuple(values),
        setting,
        work,
        memory,
        disk,
        _time(config, setting, work, speed) if speed else None,
        tuple(_warnings(config, rows, work, setting, memory, disk)),
        overrides,
        fit,
    )


def _speed(config: RunConfig, setting: Setting, work: Workload) -> Speed:
    from loratune.plan.calibration import calibrate

    return calibrate(setting.architecture, config, work.largest, setting.dtype, setting.device)


def _time(config: RunConfig, setting: Setting, work: Workload, speed: Speed) -> Time:
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
    kept = min(trainer.keep_checkpoints, 1 if not trainer.save_every else trainer.keep_checkpoints)
    kept += bool(trainer.eval_every)  # the best one stays besides
    merged = 0
    if Stage.merge in config.stages:
        size = {Dtype.float32: 4, Dtype.bfloat16: 2, Dtype.float16: 2}.get(config.merge.dtype)
        merged = setting.architecture.base_parameters * (size or setting.stored_bytes)
    folder = Path(config.out or "outputs").resolve()
    return Disk(kept * one, count.stored_bytes, merged, files.free_bytes(folder))


def _warnings(
    config: RunConfig,
    rows: Rows,
    work: Workload,
    setting: Setting,
    memory: Memory,
    disk: Disk,
) -> list[str]:
    found = list(config.adapter.warnings())
    if work.assumed:
        found.append(work.assumed)
    if work.audit is not None:
        found += [one.line for one in work.audit.findings if one.severity is not Severity.note]
    found += _capacity(memory, setting, disk)
    trainer = config.trainer
    if trainer.warmup_steps >= work.steps > 0:
        found.append(f"warm-up takes all {work.steps} steps: the learning rate never reaches lr")
    if work.epochs is not None and work.epochs > 10:
        found.append(f"{work.epochs:.0f} passes over the same rows: they will be learnt by heart")
    if learning_rate(trainer, config.adapter) == 0:
        found.append("the learning rate is 0: nothing will train")
    if not trainer.save_every and work.steps >= 1000:
        found.append("trainer.save_every is 0: a crash loses the whole run")
    if not trainer.eval_every and rows.data is not None and rows.data.eval:
        found.append("trainer.eval_every is 0: the last adapter is kept, not the best")
    return found


def _capacity(memory: Memory, setting: Setting, disk: Disk) -> list[str]:
    from loratune.plan.calibration import available_bytes

    found = []
    available = available_bytes(setting.device) if setting.is_here else None
    wanted = memory.peak - memory.process
    if available is not None and wanted * (1 + ERROR_BAR) > available:
        fix = f"try fit={available / 1e9:.1f}GB"
        needed = f"{byte_size(wanted)} may be needed: {fix}"
        found.append(f"{byte_size(available)} are free here, and {needed}")
    if not setting.is_here:
        found.append("no such device is here: memory is computed, time is not known")
    if disk.total > disk.free:
        needed = f"{byte_size(disk.total)} are needed"
        found.append(f"the disk has {byte_size(disk.free)} free, and {needed}")
    return found
