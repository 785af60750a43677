"""What a run writes down about itself: its recipe, its lines of metrics, its sealed summary."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratune import files
from loratune.config.convert import run_fields, to_plain
from loratune.config.schema import RunConfig
from loratune.config.secrets import redact
from loratune.runs.manifest import describe_files
from loratune.runs.output import OUTPUTS
from loratune.runs.run_dir import LOCK, PAGE, SUMMARY, RunDir

Record = dict[str, Any]

# What may still change when the run is over: the report is drawn again, the lock is reused.
_NOT_SEALED = (SUMMARY, LOCK, PAGE)
_NOT_RECORDED = ("out", "resume", "allow_drift")


def recipe_record(config: RunConfig) -> dict[str, Any]:
    """The recipe as runs and checkpoints record it.

    Without secrets, and without what applies to one start only, so that a run that was killed or
    moved has the same bytes as one that was not.
    """
    values = run_fields(to_plain(config))
    record: dict[str, Any] = redact({k: v for k, v in values.items() if k not in _NOT_RECORDED})
    return record


def write_recipe(run_dir: RunDir, config: RunConfig) -> None:
    """The resolved recipe, reloadable, without secrets."""
    import yaml

    text = yaml.safe_dump(recipe_record(config), sort_keys=False, allow_unicode=True)
    files.write_text(run_dir.recipe, text)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line to a jsonl file."""
    with files.storage_errors(path), files.open_own(path, os.O_WRONLY | os.O_APPEND, "a") as file:
        file.write(_line(record))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=True) + "\n"


def read_lines(path: Path) -> list[Record]:
    """The records of a jsonl file; half-written or foreign lines are left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a killed run may be half written
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def sync_lines(path: Path) -> None:
    """Flush what was appended to a file, if there is one."""
    if path.exists():
        with files.storage_errors(path):
            files.sync_file(path)


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines of a jsonl file that a resumed run will write again."""
    if path.exists():
        lines = (_line(record) for record in read_lines(path) if record["step"] <= step)
        files.write_text(path, "".join(lines))


def write_summary(run_dir: RunDir, record: Mapping[str, Any]) -> None:
    """Write ``summary.json`` with the sha256 and size of every record beside it.

    Raises:
        StorageError: if the disk refuses.
    """
    sealed = [
        path
        for path in run_dir.path.iterdir()
        if path.is_file() and not path.is_symlink() and path.name not in _NOT_SEALED
    ]
    files.write_sealed_json(run_dir.summary, {**record, "files": describe_files(sealed)})


def link_latest(run_dir: RunDir, name: str) -> None:
    """``outputs/NAME/latest`` points to this run; only a convenience, so never an error."""
    if run_dir.path.parent != OUTPUTS / name:
        return
    link = run_dir.path.parent / "latest"
    temporary = files.temporary_name(link)
    try:
        if link.exists() and not link.is_symlink():
            return
        temporary.symlink_to(run_dir.path.name)
        os.replace(temporary, link)
    except OSError:
        temporary.unlink(missing_ok=True)
