"""What a case left on disk, and cases side by side."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def in_parallel(function: Any, items: Iterable[Any]) -> list[Any]:
    """`function(item)` of every item, two at a time, in order; the first exception is raised."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def tree(folder: Path) -> dict[str, str]:
    """Relative path to sha256 of every file (or target of every link) below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


REPRODUCIBLE = ("adapter", "checkpoints", "merged", "metrics.jsonl", "evaluation.json")
"""What two runs of one recipe must share byte for byte."""
_TIMED = ("merge_report.json",)


def result(run: Path) -> dict[str, str]:
    """The reproducible part of a run folder: path to sha256."""
    return {
        name: value
        for name, value in tree(run).items()
        if name.split("/")[0] in REPRODUCIBLE and not name.endswith(_TIMED)
    }


def differences(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """Names whose bytes differ, or that only one of them has."""
    names = sorted(first.keys() | second.keys())
    return [name for name in names if first.get(name) != second.get(name)]


def leftovers(run: Path) -> list[str]:
    """Temporary names anywhere in a run folder."""
    return [str(path.relative_to(run)) for path in run.rglob(".tmp-*")]
