"""Checkpoints that verify or do not exist.

``checkpoints/step_000500/`` holds safetensors and JSON only.  It is written under a temporary
name, every file is flushed, ``manifest.json`` (sha256 and size of every file, and what the run
was made of) comes last, then one rename makes it visible.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune import files
from loratune.errors import CheckpointError
from loratune.runs.manifest import describe_files, file_problem

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
STATE = "state.json"
SHARD_BYTES = 4_000_000_000
_SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")
_PREFIX = "step_"
_NEWER = "use that version of loratune, or start a new run with another out=DIR"
_OTHER = "resume from another checkpoint, or resume=auto"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        tensors: file stem to tensors: adapter, optimizer, rng.
        state: everything else that training needs to go on.
        facts: what the run was made of: recipe, fingerprints, versions.
    """

    path: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    facts: Mapping[str, Any]


def checkpoint_path(folder: Path, step: int) -> Path:
    """``folder/step_000500``."""
    return folder / f"{_PREFIX}{step:06d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(path.name.removeprefix(_PREFIX))


def published_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first; links are never followed."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _is_published(path)), key=step_of)


def _is_published(path: Path) -> bool:
    is_step = path.name.startswith(_PREFIX) and path.name.removeprefix(_PREFIX).isdigit()
    return is_step and not path.is_symlink()


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Publish a checkpoint; an identical step already there is replaced only if damaged.

    Tensors that the processes share out are gathered in the order of the mappings.

    Raises:
        StorageError: if the disk refuses; earlier checkpoints are untouched.
    """
    path = checkpoint_path(folder, step)
    if has_checkpoint(folder, step):
        return
    with files.storage_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
    with files.published_folder(path) as temporary:
        for stem, group in tensors.items():
            _write_tensors(temporary, stem, group)
        files.write_json(temporary / STATE, dict(state))
        entries = describe_files(temporary.iterdir())
        manifest = {"format": files.FORMAT, "step": step, "files": entries, **facts}
        files.write_sealed_json(temporary / MANIFEST, manifest)


def has_checkpoint(folder: Path, step: int) -> bool:
    """Whether a step's checkpoint is there already; a damaged one is moved out of the way."""
    path = checkpoint_path(folder, step)
    if not path.exists():
        return False
    if damage(path):
        quarantine(path)
        return False
    return True


def _write_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> None:
    """One file, or numbered ones of at most ``SHARD_BYTES`` each; one at a time is in memory."""
    from safetensors.torch import save_file

    shards = _shards(tensors)
    for number, names in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        plain = {name: _plain(tensors[name]) for name in names}
        save_file(plain, folder / f"{stem}{part}.safetensors", metadata={"format": "pt"})


def _plain(tensor: Tensor) -> Tensor:
    """The whole tensor in memory that is its own, as safetensors wants it."""
    from loratune.runs.sharded import gathered

    return gathered(tensor).detach().cpu().contiguous().clone()


def _shards(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the tensors of each file, in their order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest, its seal and step checked; the files that it lists are not.

    Raises:
        NewerCheckpointError: if a newer loratune wrote it.
        CheckpointError: if it is missing, changed or another step's.
    """
    if not path.is_dir():
        raise CheckpointError("no such folder", where=str(path), fix=_OTHER)
    problem = ""
    try:
        manifest = files.read_sealed_json(path / MANIFEST)
        dict(manifest["files"].items())
        if int(manifest["step"]) == step_of(path):
            return manifest
        problem = f"belongs to step {manifest['step']}"
    except files.NewerFormatError as error:
        cause = f"{MANIFEST} was {error}"
        raise NewerCheckpointError(cause, where=str(path), fix=_NEWER) from error
    except FileNotFoundError:
        problem = "is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"is unreadable ({type(error).__name__})"
    raise CheckpointError(f"{MANIFEST} {problem}", where=str(path), fix=_OTHER)


class NewerCheckpointError(CheckpointError):
    """A whole checkpoint that this version cannot read: neither skipped nor set aside."""


def damage(path: Path) -> str:
    """What is wrong with a checkpoint folder, or an empty string if every byte verifies.

    Raises:
        NewerCheckpointError: if a newer loratune wrote it.
    """
    try:
        entries = read_manifest(path)["files"]
    except NewerCheckpointError:
        raise
    except CheckpointError as error:
        return error.cause
    problems = ((name, file_problem(path, name, entry)) for name, entry in entries.items())
    return next((f"{name} {problem}" for name, problem in problems if problem), "")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after verifying every byte.

    Raises:
        CheckpointError: if anything is missing or differs.
    """
    from safetensors.torch import load_file

    problem = damage(path)
    if problem:
        raise CheckpointError(f"damaged checkpoint: {problem}", where=str(path), fix=_OTHER)
    manifest = read_manifest(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            stem = _SHARD_NUMBER.sub("", name.removesuffix(".safetensors"))
            tensors.setdefault(stem, {}).update(load_file(path / name))
    facts = {key: value for key, value in manifest.items() if key not in ("files", "format")}
    state = files.read_json(path / STATE)
    return Checkpoint(path, int(manifest["step"]), tensors, state, facts)


def newest_verified(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for every newer one that does not.

    Raises:
        CheckpointError: if checkpoints were published and none verifies: never start over
            silently.
    """
    skipped: list[str] = []
    for path in reversed(published_checkpoints(folder)):
        problem = damage(path)
        if not problem:
            return path, skipped
        skipped.append(f"{path.name}: {problem}")
    if skipped:
        raise CheckpointError(
            "every checkpoint is damaged: " + ", ".join(skipped),
            where=str(folder),
            fix="restore one from a backup, or start a new run with another out=DIR",
        )
    return None, []


def quarantine(path: Path, label: str = "damaged") -> None:
    """Move a checkpoint out of the way; it is neither counted nor deleted."""
    number = 0
    while (target := path.with_name(f"{label}-{path.name}-{number}")).exists():
        number += 1
    with files.storage_errors(path):
        path.rename(target)


def set_aside_later(folder: Path, step: int) -> None:
    """A run that goes on from an earlier checkpoint must not meet the later ones again."""
    for path in published_checkpoints(folder):
        if step_of(path) > step:
            quarantine(path, "damaged" if damage(path) else "superseded")


def rotate(folder: Path, keep: int, protected: Collection[int]) -> None:
    """Remove old checkpoints, keeping the ``keep`` newest verified ones and the protected steps.

    Damaged ones are quarantined, not counted; links are never followed.
    """
    verified = []
    for path in published_checkpoints(folder):
        if damage(path):
            quarantine(path)
        else:
            verified.append(path)
    for path in verified[: max(len(verified) - max(keep, 1), 0)]:
        if step_of(path) not in protected:
            with files.storage_errors(path):
                hidden = path.with_name(f"{files.TEMPORARY_PREFIX}old-{path.name}")
                path.rename(hidden)  # gone at once for readers, then deleted at leisure
                shutil.rmtree(hidden)
