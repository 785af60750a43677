"""Adapters and exports: seals, hashes, finite tensors, and whether they fit a base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratune.adapter_files.offline import attach
from loratune.adapter_files.peft_format import FACTS, TENSORS, read_adapter
from loratune.config.schema import ExportFormat
from loratune.errors import LoratuneError, MergeError
from loratune.models.fingerprint import file_fingerprint
from loratune.runs.run_dir import CERTIFICATE
from loratune.verify.checks import Base, Check, compared, file_checks, sealed, unfit_names, unusable


def check_adapter(
    folder: Path, base: Base | None = None, *, beside: str = FACTS, ours: bool = False
) -> list[Check]:
    """An adapter's seal, files and tensors; with a base, whether it belongs to it and fits.

    Args:
        folder: the adapter, ours or PEFT's.
        base: the base model.
        beside: another file that records the folder's files.
        ours: whether loratune is known to have written it.
    """
    checks = []
    facts: dict[str, Any] = {}
    if (folder / FACTS).exists() or (folder / FACTS).is_symlink():
        facts, seal = sealed(folder, FACTS, MergeError)
        checks.append(seal)
        recorded = dict(facts.get("files") or {})
        if not seal.problem:
            checks += [
                check
                for check in file_checks(folder, recorded, FACTS, MergeError)
                if check.item != beside
            ]
    elif ours:
        checks.append(Check(FACTS, "seal, sha256", f"{FACTS} is missing"))
    else:
        note = "written by another tool: nothing was recorded"
        checks.append(Check(FACTS, "seal, sha256", note=note))
    checks.append(_tensor_check(folder))
    if base is not None:
        checks += base_checks(facts, base, ".", MergeError)
        checks.append(_fit_check(folder, base))
    return checks


def _tensor_check(folder: Path) -> Check:
    what = "finite, not empty"
    try:
        names = unfit_names(folder / TENSORS)
    except LoratuneError as error:
        return unusable(TENSORS, what, error)
    problem = f"'{names[0]}' and {len(names) - 1} more are not" if names else ""
    return Check(TENSORS, what, problem)


def _fit_check(folder: Path, base: Base) -> Check:
    what = "fits the base's layers"
    try:
        attach(base.folder, read_adapter(folder))
    except LoratuneError as error:
        return unusable(TENSORS, what, error)
    return Check(TENSORS, what)


def base_checks(
    facts: dict[str, Any], base: Base, item: str, error: type[LoratuneError]
) -> list[Check]:
    """Whether a base model's weights and tokenizer are the recorded ones."""
    checks = []
    for key, what in (("base", "base weights"), ("tokenizer", "tokenizer")):
        try:
            now = base.fingerprint if key == "base" else base.tokenizer
            checks.append(compared(item, what, facts.get(key), now, error))
        except LoratuneError as reason:
            checks.append(unusable(item, what, reason))
    return checks


def check_export(
    folder: Path, base: Base | None = None, originals: Sequence[Path] = ()
) -> list[Check]:
    """An export's certificate, files and tensors; with the original, whether it came from it."""
    certificate, seal = sealed(folder, CERTIFICATE, MergeError)
    if seal.problem:
        return [seal]
    checks = [seal, *file_checks(folder, certificate["files"], CERTIFICATE, MergeError)]
    if any(check.problem for check in checks):
        return checks
    for original in originals:
        now = file_fingerprint(original / TENSORS)
        checks.append(compared(TENSORS, "exported from", certificate.get("original"), now))
    if certificate["form"] in (ExportFormat.gguf, ExportFormat.gguf_lora):
        return checks + ([] if base is None else base_checks(certificate, base, ".", MergeError))
    exported = file_fingerprint(folder / TENSORS)
    checks.append(compared(TENSORS, "tensors", certificate.get("exported"), exported))
    return [*checks, *check_adapter(folder, base, beside=CERTIFICATE)]
