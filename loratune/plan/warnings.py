"""What is doubtful about a recipe, seen from its plan."""

from __future__ import annotations

from loratune.config.schema import RunConfig
from loratune.data.audit import Severity
from loratune.plan.machine import available_bytes
from loratune.plan.memory import ERROR_BAR, Memory
from loratune.plan.plan import Disk
from loratune.plan.setting import Setting
from loratune.plan.workload import Rows, Workload
from loratune.training.optim import learning_rate
from loratune.training.schedule import warmup_warning
from loratune.units import byte_size


def plan_warnings(
    config: RunConfig,
    rows: Rows,
    work: Workload,
    setting: Setting,
    memory: Memory,
    disk: Disk,
) -> list[str]:
    """One line for each thing worth changing, or knowing, before the run starts."""
    warnings = list(config.adapter.warnings())
    if work.assumed:
        warnings.append(work.assumed)
    if work.audit is not None:
        warnings += [one.line for one in work.audit.findings if one.severity is not Severity.note]
    warnings += _capacity(memory, setting, disk)
    trainer = config.trainer
    warnings += filter(None, [warmup_warning(work.steps, trainer)])
    if work.epochs is not None and work.epochs > 10:
        warnings.append(f"{work.epochs:.0f} passes over the same rows: they will be memorised")
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
