"""The last thing a run writes: what it came to, and a seal on its records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratune import files

SUMMARY = "summary.json"
# What may still change when the run is over: the report is drawn again, the lock is reused.
_NOT_SEALED = (SUMMARY, ".lock", "report.html")


def write_summary(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``summary.json`` with the sha256 and size of every record beside it.

    Raises:
        StorageError: if the disk refuses.
    """
    described = {
        path.name: {"sha256": files.sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.is_symlink() and path.name not in _NOT_SEALED
    }
    files.write_sealed_json(folder / SUMMARY, {**record, "files": described})
