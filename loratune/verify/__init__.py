"""Re-check what loratune published, from its files alone.

    loratune verify DIR                      seals, hashes, sizes, fingerprints
    loratune verify DIR model.path=BASE      also against the base model's weights

Nothing is loaded whole: files are hashed in pieces and tensors read one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loratune.adapter_files.peft_config import CONFIG as ADAPTER_CONFIG
from loratune.errors import ConfigError, MergeError
from loratune.runs.run_dir import CERTIFICATE, MERGE_REPORT
from loratune.verify.adapter import check_adapter, check_export
from loratune.verify.checks import Base, Check, Verification
from loratune.verify.merged import check_merged
from loratune.verify.run import check_checkpoint, check_run, is_checkpoint, is_run

__all__ = ["Check", "Verification", "kind_of", "verify"]


def kind_of(folder: Path) -> str:
    """What lies in a folder: merged model, export, adapter, checkpoint or run.

    Raises:
        ConfigError: if it is none of these.
    """
    if not folder.is_dir():
        raise ConfigError("no such folder", where=str(folder), fix="name a folder to verify")
    kinds = {
        "merged model": (folder / MERGE_REPORT).exists(),
        "export": (folder / CERTIFICATE).exists(),
        "adapter": (folder / ADAPTER_CONFIG).exists(),
        "checkpoint": is_checkpoint(folder),
        "run": is_run(folder),
    }
    for kind, is_here in kinds.items():
        if is_here:
            return kind
    raise ConfigError(
        "nothing here that loratune published",
        where=str(folder),
        fix="name a merged model, an export, an adapter, a checkpoint or a run folder",
    )


def verify(folder: Path, base: Path | None = None, adapters: Sequence[Path] = ()) -> Verification:
    """Check everything that can be checked.

    Args:
        folder: a merged model, an export, an adapter, a checkpoint, or a run that holds them.
        base: the base model's folder, to compare weights with.
        adapters: what was merged or exported, to compute it again; needs ``base``.

    Returns:
        Every check with its result; ``raise_problems`` turns failures into errors.

    Raises:
        ConfigError: if there is nothing to check.
    """
    kind, compared_with = kind_of(folder), Base(base) if base else None
    try:
        return Verification(kind, folder, _checks(kind, folder, compared_with, adapters))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # A seal can be forged; what it seals must still be what loratune writes.
        cause = f"the records are not loratune's ({type(error).__name__})"
        raise MergeError(cause, where=str(folder), fix="make it again") from error


def _checks(kind: str, folder: Path, base: Base | None, adapters: Sequence[Path]) -> list[Check]:
    if kind == "merged model":
        return check_merged(folder, base, adapters)
    if kind == "export":
        return check_export(folder, base, adapters)
    if kind == "adapter":
        return check_adapter(folder, base)
    if kind == "checkpoint":
        return check_checkpoint(folder, base)
    return check_run(folder, base)
