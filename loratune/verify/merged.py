"""Merged models: certificate, files, fingerprint; and W' = W + ΔW computed once more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from loratune.adapter_files.peft_format import TENSORS, read_adapter
from loratune.errors import LoratuneError, MergeError
from loratune.merging.plan import MergePlan
from loratune.merging.threads import in_order, tensor_threads
from loratune.models.build import meta_base
from loratune.models.dtypes import FLOATING
from loratune.models.fingerprint import file_fingerprint
from loratune.models.stored_names import StoredGroup, StoredNames
from loratune.models.weights import (
    TensorEntry,
    hash_tensors,
    read_one,
    tensor_entries,
)
from loratune.runs.run_dir import MERGE_REPORT
from loratune.verify.checks import Base, Check, compared, file_checks, sealed, unusable


def check_merged(
    folder: Path, base: Base | None = None, adapters: Sequence[Path] = ()
) -> list[Check]:
    """A merged model's seal, files and tensors; with the base, what the merge changed.

    Args:
        folder: the merged model.
        base: the base model.
        adapters: the adapters that were merged, to compute every weight again.
    """
    report, seal = sealed(folder, MERGE_REPORT, MergeError)
    if seal.problem:
        return [seal]
    checks = [seal, *file_checks(folder, report["files"], MERGE_REPORT, MergeError)]
    if any(check.problem for check in checks):
        return checks
    if base is not None:
        checks += _base_checks(report, base, folder, adapters)
    return checks


def _base_checks(
    report: Mapping[str, Any],
    base: Base,
    folder: Path,
    adapters: Sequence[Path],
) -> list[Check]:
    try:
        checks = [compared(".", "base weights", report.get("base"), base.fingerprint)]
    except LoratuneError as error:
        return [unusable(".", "base weights", error)]
    if checks[0].problem:
        return checks
    try:
        merged = tensor_entries(folder)
    except LoratuneError as error:
        return [*checks, unusable(".", "weights", error)]
    if adapters:
        return [*checks, *_recompute(report, base, merged, adapters)]
    return [*checks, *_norm_checks(report, base, merged)]


# -- without the adapter -------------------------------------------------------------------


def _norm_checks(
    report: Mapping[str, Any],
    base: Base,
    merged: Mapping[str, TensorEntry],
) -> list[Check]:
    """W' − W of every certified module must be as large as its certificate says."""
    entries = base.entries
    proofs = {str(proof["module"]): proof for proof in report.get("modules", [])}
    names = StoredNames(meta_base(base.folder), entries)
    bad = _moved_otherwise(proofs, names, entries, merged)
    problem = f"'{bad[0]}' moved by another amount ({bad[1]:.1%})" if bad else ""
    hashes = hash_tensors(merged)
    changed = [n for n in merged if n in entries and hashes[n] != base.hashes[n]]
    same_dtype = all(merged[n].dtype == entries[n].dtype for n in merged if n in entries)
    groups = (names.own(_weight_of(module, names)) for module in proofs)
    certified = {name for group in groups if group is not None for name in group.stored}
    stray = [name for name in changed if name not in certified]
    unchanged = Check(".", f"{len(entries) - len(changed)} other tensors as in the base")
    if same_dtype and proofs and stray:
        unchanged = Check(stray[0], "as in the base", note="changed: a module trained in full?")
    return [Check(".", f"size of the change in {len(proofs)} modules", problem), unchanged]


def _moved_otherwise(
    proofs: Mapping[str, Mapping[str, Any]],
    names: StoredNames,
    entries: Mapping[str, TensorEntry],
    merged: Mapping[str, TensorEntry],
) -> tuple[str, float] | None:
    """The module whose change is furthest from its certificate, and by how much; or None."""
    errors: dict[str, float] = {}
    for module, proof in proofs.items():
        weight = _weight_of(module, names)
        group = names.own(weight)
        if group is None:
            continue  # it shared a tensor in the base, and has one of its own now
        before, after = (_values_of(group, where)[weight] for where in (entries, merged))
        norm = float((after.double() - before.double()).norm())
        expected = float(proof["delta_norm"])
        error = abs(norm - expected) / (expected or 1.0)
        if not error <= float(proof["residual"]) + 1e-4:
            errors[module] = error
    return max(errors.items(), key=lambda item: item[1], default=None)


def _weight_of(module: str, names: StoredNames) -> str:
    """Name of a certified module's weight: stacked experts are a parameter themselves."""
    return module if names.own(module) is not None else f"{module}.weight"


def _values_of(group: StoredGroup, entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    """The parameters that a model's stored tensors become."""
    return group.to_parameters({name: read_one(entries[name]) for name in group.stored})


# -- with the adapter ----------------------------------------------------------------------


def _recompute(
    report: Mapping[str, Any],
    base: Base,
    merged: Mapping[str, TensorEntry],
    adapters: Sequence[Path],
) -> list[Check]:
    """Every tensor of the merged model, proved again from base and adapters."""
    try:
        prints = [file_fingerprint(folder / TENSORS) for folder in adapters]
        if prints != list(report.get("adapters", [])):
            problem = "these are not the adapters that were merged"
            return [Check(".", "adapters", problem)]
        plan = MergePlan([read_adapter(folder) for folder in adapters], base.folder)
        differing = _differing(plan, merged)
    except LoratuneError as error:
        return [unusable(".", "adapters", error)]
    problem = f"'{differing[0]}' and {len(differing) - 1} more are not" if differing else ""
    what = f"{len(merged)} tensors equal base + adapter, computed again"
    return [Check(".", "adapters"), Check(".", what, problem)]


def _differing(plan: MergePlan, merged: Mapping[str, TensorEntry]) -> list[str]:
    names = [name for name, entry in merged.items() if entry.dtype in FLOATING]
    with tensor_threads() as pool:
        equal = in_order(pool, (partial(plan.is_as_planned, name, merged) for name in names))
        return [name for name, is_same in zip(names, equal, strict=True) if not is_same]
