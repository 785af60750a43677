"""One check and its result; what the checks of every kind of folder share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from loratune import files
from loratune.errors import LoratuneError, MergeError, raise_together
from loratune.models.dtypes import FLOATING
from loratune.models.fingerprint import combine_hashes, tokenizer_fingerprint
from loratune.models.load import load_tokenizer
from loratune.models.weights import (
    TensorEntry,
    check_stored,
    hash_tensors,
    is_finite,
    mapped,
    read_header,
    tensor_entries,
    tensor_in,
)
from loratune.runs.manifest import file_problem

# What a loader would read, or could be made to run: such a file must have been published with
# the rest.  A README or a licence added later does no harm.
_LOADED = {
    ".safetensors", ".json", ".jinja", ".model", ".txt", ".bin", ".pt", ".pth", ".ckpt", ".pkl",
    ".py", ".so", ".gguf",
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        item: a file, tensor or module, relative to the verified folder.
        what: what was compared.
        problem: what differs; empty if nothing does.
        note: why it could not be checked; empty if it was.
        error: kind of error that a problem is.
        fix: what to do about a problem.
    """

    item: str
    what: str
    problem: str = ""
    note: str = ""
    error: type[LoratuneError] = MergeError
    fix: str = "restore it from a copy, or make it again; do not use it as it is"

    @property
    def status(self) -> str:
        """``differs``, ``not checked`` or ``ok``."""
        return "differs" if self.problem else "not checked" if self.note else "ok"

    def within(self, folder: str) -> Check:
        """The same check seen from the folder above."""
        return replace(self, item=f"{folder}/{self.item}")


@dataclass(frozen=True)
class Verification:
    """Every check of one folder.

    Attributes:
        kind: what the folder is.
        folder: the folder.
        checks: in the order in which they were made.
    """

    kind: str
    folder: Path
    checks: Sequence[Check]

    @property
    def problems(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.problem]

    def raise_problems(self) -> None:
        """Raise every failed check at once, each as the kind of error it is.

        Raises:
            LoratuneError: exit code 7, or 6 where only checkpoints are damaged.
        """
        raise_together(
            check.error(
                f"{check.what}: {check.problem}", where=str(self.folder / check.item), fix=check.fix
            )
            for check in self.problems
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "kind": self.kind,
            "folder": str(self.folder),
            "ok": not self.problems,
            "checks": [
                {
                    "item": check.item,
                    "what": check.what,
                    "status": check.status,
                    "detail": check.problem or check.note,
                }
                for check in self.checks
            ],
        }


@dataclass
class Base:
    """The base model compared with; every property raises ``LoratuneError`` if it is unusable."""

    folder: Path

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """Where every tensor lies."""
        return tensor_entries(self.folder)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Hex sha256 of every tensor."""
        return hash_tensors(self.entries, check_stored)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the weights."""
        return combine_hashes(self.entries, self.hashes)

    @cached_property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer."""
        return tokenizer_fingerprint(load_tokenizer(self.folder))


def sealed(folder: Path, name: str, error: type[LoratuneError]) -> tuple[dict[str, Any], Check]:
    """A sealed JSON file, and the check of its seal; empty where the seal is broken."""
    path, problem, value = folder / name, "", dict[str, Any]()
    try:
        if path.is_symlink():
            problem = "is a link"
        else:
            value = files.read_sealed_json(path)
    except files.NewerFormatError as newer:
        problem = f"was {newer}"
    except FileNotFoundError:
        problem = "is missing"
    except (OSError, ValueError, AttributeError, RecursionError):
        problem = "was changed after it was published"
    return value, Check(name, "seal", problem, error=error)


def file_checks(
    folder: Path, recorded: Mapping[str, Any], own: str, error: type[LoratuneError]
) -> list[Check]:
    """Size and sha256 of every file recorded; then files that were never published.

    Args:
        folder: where they lie.
        recorded: name to ``{"sha256": ..., "bytes": ...}`` or to the sha256 alone.
        own: the file that records them.
        error: kind of error that a problem is.
    """
    checks = [
        Check(name, "sha256 and size", file_problem(folder, name, entry), error=error)
        for name, entry in sorted(recorded.items())
    ]
    for path in sorted(folder.iterdir()):
        if path.name not in recorded and path.name != own and path.suffix in _LOADED:
            checks.append(Check(path.name, "published files", "was never published", error=error))
    return checks


def unfit_names(path: Path) -> list[str]:
    """Names of a safetensors file's floating tensors that are empty, NaN or infinite.

    Raises:
        ModelError: if it is not a safetensors file.
    """
    entries = [entry for entry in read_header(path).values() if entry.dtype in FLOATING]
    content = mapped(path)

    def is_fit(entry: TensorEntry) -> bool:
        return entry.size > 0 and is_finite(tensor_in(entry, content))

    return [entry.name for entry in entries if not is_fit(entry)]


def compared(
    item: str, what: str, recorded: Any, now: Any, error: type[LoratuneError] = MergeError
) -> Check:
    """Whether a fingerprint is the recorded one; not checked where nothing was recorded."""
    if recorded is None:
        return Check(item, what, note="nothing was recorded")
    problem = "" if recorded == now else f"{str(recorded)[:12]} → {str(now)[:12]}"
    return Check(item, what, problem, error=error)


def unusable(item: str, what: str, error: LoratuneError) -> Check:
    """A check that could not be made because what it needs is unusable."""
    place = f" ({error.where})" if error.where else ""
    return Check(item, what, f"{error.cause}{place}")
