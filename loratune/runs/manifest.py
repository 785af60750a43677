"""What a published folder says of its files, and whether they are still the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loratune import files

CARD = "README.md"
"""A model card is for people, who add to it: no record holds its hash."""


def describe_files(
    paths: Iterable[Path], hashes: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Name to ``{"sha256": ..., "bytes": ...}`` of every file but the model card.

    Args:
        paths: the files, of one folder.
        hashes: name to sha256 of those that were hashed while they were written.
    """
    already = hashes or {}
    return {
        path.name: {
            "sha256": already.get(path.name) or files.sha256_file(path),
            "bytes": path.stat().st_size,
        }
        for path in sorted(paths)
        if path.name != CARD
    }


def file_problem(folder: Path, name: str, recorded: Any) -> str:
    """How a file differs from what was recorded of it, or an empty string.

    Args:
        folder: where it lies.
        name: of the file.
        recorded: ``{"sha256": ..., "bytes": ...}``, or the sha256 alone.
    """
    path = folder / name
    if name != Path(name).name or path.is_symlink():
        return "leads elsewhere"
    if not path.is_file():
        return "is missing"
    entry = recorded if isinstance(recorded, Mapping) else {"sha256": recorded}
    try:
        size = path.stat().st_size
        if "bytes" in entry and entry["bytes"] != size:
            return f"has {size:,} bytes instead of {entry['bytes']:,}"
        return "" if files.sha256_file(path) == entry.get("sha256") else "has another sha256"
    except OSError as error:  # unreadable, or removed by the run that owns it while we looked
        return f"cannot be read ({error.strerror})"
