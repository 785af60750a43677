"""Merged models: certificate, files, fingerprint; and W' = W + ΔW computed once more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune.adapter_files.offline import MetaAdapter, attach, tensor_name, weight_source
from loratune.adapter_files.peft_format import TENSORS, read_adapter
from loratune.errors import LoratuneError, MergeError
from loratune.merging.threads import in_order, tensor_threads
from loratune.merging.weight import prove_weight
from loratune.models.fingerprint import combine_hashes
from loratune.models.tensors import DTYPES, read_one
from loratune.models.weights import TensorEntry, hash_tensors, tensor_entries
from loratune.stages.merge import REPORT
from loratune.verify.base import Base
from loratune.verify.checks import Check, compared, file_checks, refused, sealed
from loratune.verify.tensors import file_fingerprint


def check_merged(
    folder: Path, base: Base | None = None, adapters: Sequence[Path] = ()
) -> list[Check]:
    """A merged model's seal, files and tensors; with the base, what the merge changed.

    Args:
        folder: the merged model.
        base: the base model.
        adapters: the adapters that were merged, to compute every weight again.
    """
    report, seal = sealed(folder, REPORT, MergeError)
    if seal.problem:
        return [seal]
    checks = [seal, *file_checks(folder, report["files"], REPORT, MergeError)]
    if any(check.problem for check in checks):
        return checks
    try:
        merged = tensor_entries(folder)
        hashes = hash_tensors(merged)
    except LoratuneError as error:
        return [*checks, refused(".", "weights", error)]
    now = combine_hashes(merged, hashes)
    checks.append(compared(".", "merged weights", report.get("merged"), now))
    if base is not None:
        checks += _base_checks(report, base, merged, hashes, adapters)
    return checks


def _base_checks(
    report: Mapping[str, Any],
    base: Base,
    merged: Mapping[str, TensorEntry],
    hashes: Mapping[str, str],
    adapters: Sequence[Path],
) -> list[Check]:
    try:
        checks = [compared(".", "base weights", report.get("base"), base.fingerprint)]
    except LoratuneError as error:
        return [refused(".", "base weights", error)]
    if checks[0].problem:
        return checks
    if adapters:
        return [*checks, *_recompute(report, base, merged, adapters)]
    return [*checks, *_norm_checks(report, base, merged, hashes)]


# -- without the adapter -------------------------------------------------------------------


def _norm_checks(
    report: Mapping[str, Any],
    base: Base,
    merged: Mapping[str, TensorEntry],
    hashes: Mapping[str, str],
) -> list[Check]:
    """W' − W of every certified module must be as large as its certificate says."""
    entries = base.entries
    proofs = {str(proof["module"]): proof for proof in report.get("modules", [])}
    worst, bad = 0.0, ""
    for module, proof in proofs.items():
        name = next((n for n in merged if _is_weight_of(n, module)), None)
        source = name if name in entries else None
        if name is None or source is None:
            continue
        moved = read_one(merged[name]).double() - read_one(entries[source]).double()
        norm, expected = float(moved.norm()), float(proof["delta_norm"])
        error = abs(norm - expected) / (expected or 1.0)
        if error > worst:
            worst = error
            bad = module if error > float(proof["residual"]) + 1e-4 else bad
    problem = f"'{bad}' moved by another amount ({worst:.1%})" if bad else ""
    changed = [n for n in merged if n in entries and hashes[n] != base.hashes[n]]
    same_dtype = all(merged[n].dtype == entries[n].dtype for n in merged if n in entries)
    stray = [n for n in changed if not any(_is_weight_of(n, module) for module in proofs)]
    left = Check(".", f"{len(entries) - len(changed)} other tensors as in the base")
    if same_dtype and proofs and stray:
        left = Check(stray[0], "as in the base", note="changed: a module trained in full?")
    return [Check(".", f"size of the change in {len(proofs)} modules", problem), left]


def _is_weight_of(name: str, module: str) -> bool:
    wanted = f"{module}.weight"
    return name == wanted or wanted.endswith("." + name)


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
        offline = [attach(base.folder, read_adapter(folder)) for folder in adapters]
        differing = _differing(dict(base.entries), merged, offline)
    except LoratuneError as error:
        return [refused(".", "adapters", error)]
    problem = f"'{differing[0]}' and {len(differing) - 1} more are not" if differing else ""
    what = f"{len(merged)} tensors equal base + adapter, computed again"
    return [Check(".", "adapters"), Check(".", what, problem)]


def _differing(
    entries: dict[str, TensorEntry],
    merged: Mapping[str, TensorEntry],
    offline: Sequence[MetaAdapter],
) -> list[str]:
    layers, trained = _layers(entries, offline), _trained(entries, offline)

    def is_equal(name: str) -> bool:
        found = read_one(merged[name])
        if name in trained:
            return torch.equal(trained[name].detach().reshape(found.shape).to(found.dtype), found)
        source, modules = layers.get(name, (name, []))
        if source not in entries:
            return False
        base = read_one(entries[source])
        if not modules:
            return torch.equal(base.to(found.dtype), found)
        try:
            prove_weight(base, [one.wrapped.adapters[module] for one, module in modules], found)
        except MergeError:
            return False
        return True

    names = [name for name, entry in merged.items() if entry.dtype in DTYPES]
    with tensor_threads() as pool:
        equal = in_order(pool, (partial(is_equal, name) for name in names))
        return [name for name, is_same in zip(names, equal, strict=True) if not is_same]


def _layers(
    entries: dict[str, TensorEntry], offline: Sequence[MetaAdapter]
) -> dict[str, tuple[str, list[tuple[MetaAdapter, str]]]]:
    """Merged tensor name to the base tensor it comes from and the layers added to it."""
    found: dict[str, tuple[str, list[tuple[MetaAdapter, str]]]] = {}
    for one in offline:
        for module in one.wrapped.adapters:
            source = weight_source(one, entries, module)
            parted = one.tied and module == one.output_head
            name = f"{module}.weight" if parted else source
            found.setdefault(name, (source, []))[1].append((one, module))
        head = f"{one.output_head}.weight"
        if one.unties and head not in entries:
            found.setdefault(head, (weight_source(one, entries, one.output_head), []))
    return found


def _trained(entries: dict[str, TensorEntry], offline: Sequence[MetaAdapter]) -> dict[str, Tensor]:
    """Merged tensor name to the value of modules that were trained in full."""
    found: dict[str, Tensor] = {}
    for one in offline:
        for module, layer in one.wrapped.saved_modules.items():
            for key, value in layer.trained_module.state_dict().items():
                wanted = f"{module}.{key}"
                found[tensor_name(entries, wanted, one.prefix) or wanted] = value
    return found
