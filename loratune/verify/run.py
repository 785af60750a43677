"""Checkpoints, and runs with everything that lies in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from loratune import files
from loratune.adapter_files.peft_config import CONFIG as ADAPTER_CONFIG
from loratune.adapter_files.peft_format import TENSORS
from loratune.errors import CheckpointError, LoratuneError
from loratune.models.fingerprint import file_fingerprint
from loratune.runs.checkpoint import MANIFEST, published_checkpoints, read_manifest
from loratune.runs.run_dir import CERTIFICATE, MERGE_REPORT, SUMMARY, RunDir
from loratune.verify.adapter import base_checks, check_adapter, check_export
from loratune.verify.checks import Base, Check, file_checks, sealed, unfit_names
from loratune.verify.merged import check_merged

_ADAPTER = "adapter.safetensors"
_ADAPTER_FILES = "adapter*.safetensors"
_TRIES = 10


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, damaged or not."""
    return (folder / MANIFEST).exists() or folder.name.startswith("step_")


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or what is left of one."""
    run = RunDir(folder)
    return any(path.exists() for path in (run.recipe, run.checkpoints, run.adapter, run.merged))


def check_checkpoint(folder: Path, base: Base | None = None) -> list[Check]:
    """A checkpoint's manifest, every file, and its adapter's values."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [Check(MANIFEST, "seal", error.cause, error=CheckpointError)]
    checks = [Check(MANIFEST, "seal")]
    checks += file_checks(folder, manifest["files"], MANIFEST, CheckpointError)
    if any(check.problem for check in checks):
        return checks
    names = [name for part in folder.glob(_ADAPTER_FILES) for name in unfit_names(part)]
    problem = f"'{names[0]}' is not" if names else ""
    checks.append(Check(_ADAPTER, "finite, not empty", problem, error=CheckpointError))
    if base is not None:
        checks += base_checks(manifest, base, ".", CheckpointError)
    return checks


def check_run(folder: Path, base: Base | None = None) -> list[Check]:
    """Every checkpoint, the adapter, the merged model, the export, and the run's own records."""
    run = RunDir(folder)
    checks = _record_checks(folder)
    for path in published_checkpoints(run.checkpoints):
        place = f"{run.checkpoints.name}/{path.name}"
        found = _while_it_stays(path, lambda path: check_checkpoint(path, base))
        checks += [check.within(place) for check in found]
    if run.adapter.is_dir():
        found = _while_it_stays(run.adapter, lambda path: check_adapter(path, base, ours=True))
        checks += [check.within(run.adapter.name) for check in found]
    elif run.summary.exists():
        checks.append(Check(run.adapter.name, "published files", "the folder is missing"))
    if (run.merge_report).exists():
        adapters = _merged_from(run) if base is not None else []
        checks += [c.within(run.merged.name) for c in check_merged(run.merged, base, adapters)]
    elif run.merged.exists():
        checks.append(Check(run.merged.name, "certificate", f"{MERGE_REPORT} is missing"))
    if (run.export / CERTIFICATE).exists():
        checks += [c.within(run.export.name) for c in check_export(run.export, base)]
    elif (run.export / ADAPTER_CONFIG).exists():
        checks.append(Check(run.export.name, "certificate", f"{CERTIFICATE} is missing"))
    return checks


def _while_it_stays(folder: Path, look: Callable[[Path], list[Check]]) -> list[Check]:
    """What ``look`` finds wrong counts only of a folder that a live run left in its place.

    One that the run rotated away meanwhile is skipped, one that it replaced is looked at again.
    """
    for _ in range(_TRIES):
        before = _identity(folder)
        if before is None:
            return []
        try:
            checks = look(folder)
        except OSError:
            if _identity(folder) == before:
                raise
            continue
        if _identity(folder) == before or not any(check.problem for check in checks):
            return checks
    return []


def _identity(folder: Path) -> tuple[int, int] | None:
    """Which folder lies under a name; ``None`` if there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def _record_checks(folder: Path) -> list[Check]:
    """The files that the finished run sealed; an unfinished run has sealed none."""
    if not (folder / SUMMARY).exists():
        note = "the run is not finished: its records are not sealed yet"
        return [Check(SUMMARY, "seal", note=note)]
    summary, seal = sealed(folder, SUMMARY, CheckpointError)
    recorded: dict[str, Any] = summary.get("files") or {}
    checks = file_checks(folder, recorded, SUMMARY, CheckpointError)
    return [seal, *(check for check in checks if check.what != "published files")]


def _merged_from(run: RunDir) -> list[Path]:
    """The run's adapter, if the merged model says that it was made from it alone."""
    try:
        adapters = files.read_sealed_json(run.merge_report).get("adapters")
        own = file_fingerprint(run.adapter / TENSORS)
    except (OSError, ValueError, LoratuneError):
        return []
    return [run.adapter] if adapters == [own] else []
