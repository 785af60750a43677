"""Where a run's result comes from: versions, code, machine."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loratune import files
from loratune.runs.run_dir import MERGE_REPORT

PACKAGES = (
    "loratune", "torch", "transformers", "tokenizers", "safetensors", "hydra-core", "omegaconf",
    "datasets", "numpy",
)  # fmt: skip


def package_versions() -> dict[str, str]:
    """Versions of what computes."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def provenance(device: str) -> dict[str, Any]:
    """Versions, git state of the working folder, and the machine."""
    return {
        "versions": package_versions(),
        "git": git_state(Path.cwd()),
        "device": device,
        "platform": platform.platform(),
        "processor": _processor(),
        "command": [*Path(sys.argv[0]).name.split(), *sys.argv[1:]],
    }


def merged_before(folder: Path) -> dict[str, Any] | None:
    """What a base model was merged from, where loratune merged it, else ``None``."""
    try:
        report = files.read_sealed_json(folder / MERGE_REPORT)
        return {key: report[key] for key in ("base", "adapters")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError):
        return {"base": None, "adapters": None}  # merged, but the record is broken


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether there are uncommitted changes, or ``None`` outside a checkout."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
    )
    return result.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
