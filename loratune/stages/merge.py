"""Write base + adapter as one plain model folder, shard by shard, with its proof."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loratune import files
from loratune.adapter_files.offline import MetaAdapter, has_no_effect
from loratune.adapter_files.peft_format import AdapterFolder
from loratune.config.schema import Dtype, MergeConfig
from loratune.errors import MergeError
from loratune.merging.logits import LogitsProof, prove_logits, wants_logits
from loratune.merging.plan import MergePlan
from loratune.merging.weight import ModuleProof
from loratune.merging.writer import write_merged
from loratune.models.fingerprint import tensors_fingerprint
from loratune.models.weights import INDEX, SINGLE, TensorEntry
from loratune.runs.drift import fact_changes, refuse
from loratune.runs.provenance import package_versions

REPORT = "merge_report.json"
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja")
_NOT_COPIED = (INDEX, REPORT, "config.json", "adapter_config.json", "loratune.json")


@dataclass(frozen=True)
class MergeReport:
    """The certificate of a merge; ``merge_report.json`` holds the same.

    Attributes:
        base: fingerprint of the base's weights.
        adapters: fingerprint of each adapter's tensors.
        tokenizer: fingerprint recorded with the first adapter, if any.
        merged: fingerprint of the merged weights.
        dtype: of the merged weights where it was changed, else ``base``.
        untied: whether head and input embedding had to part.
        modules: the proof of every changed module.
        logits: the whole model's proof, if it was made.
        delta_kept: share of all corrections that survived rounding.
        files: name to sha256 and bytes of every file written.
        drift: differences from what was recorded that were allowed.
    """

    base: str
    adapters: list[str]
    tokenizer: str | None
    merged: str
    dtype: str
    untied: bool
    modules: list[ModuleProof]
    logits: LogitsProof | None
    delta_kept: float
    seconds: float
    drift: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def worst(self) -> ModuleProof:
        """The module that lost most to rounding."""
        return max(self.modules, key=lambda proof: proof.residual)


def merge(
    adapters: Sequence[AdapterFolder],
    base_folder: Path,
    out: Path,
    config: MergeConfig,
    *,
    tokenizer: str | None = None,
    allow_drift: Sequence[str] = (),
) -> MergeReport:
    """Write ``out`` as a plain Hugging Face folder of base + adapters; whole or not at all.

    The base is read and the result written one tensor at a time, so memory stays at the largest
    tensor.  Several adapters are summed in fp32 once.

    Args:
        adapters: adapters to put in, usually one.
        base_folder: the base model's files.
        out: must not exist, or be empty.
        config: output dtype and kind of proof.
        tokenizer: fingerprint of the base's tokenizer, compared with the recorded one.
        allow_drift: recorded facts (base, tokenizer) allowed to differ.

    Raises:
        MergeError: wrong base, an adapter without effect, or a proof that fails.
        StorageError: if the disk refuses.
    """
    started = time.perf_counter()
    _refuse_merged_before(adapters, base_folder)
    plan = MergePlan(adapters, base_folder, config.dtype)
    _refuse_no_effect(plan.offline)
    needed = sum(entry.end - entry.begin for entry in plan.entries.values())
    _refuse_small_disk(out, needed)
    with files.published_folder(out) as target:
        written = write_merged(plan, target)
        facts = {"base": written.base, "tokenizer": tokenizer}
        drift = [line for a in adapters for line in _check_binding(a, facts, allow_drift)]
        _write_index(target, written.entries)
        _write_config(base_folder, target, config.dtype, unties=plan.unties)
        _copy_side_files(base_folder, target)
        logits = None
        if wants_logits(config.verify, adapters, needed):
            logits = prove_logits(base_folder, adapters[0], target)
        report = MergeReport(
            base=written.base,
            adapters=[tensors_fingerprint(adapter.tensors) for adapter in adapters],
            tokenizer=tokenizer,
            merged=written.merged,
            dtype="base" if config.dtype is Dtype.auto else str(config.dtype),
            untied=plan.unties,
            modules=written.proofs,
            logits=logits,
            delta_kept=_overall_kept(written.proofs),
            seconds=time.perf_counter() - started,
            drift=drift,
            versions=package_versions(),
            files=_described_files(target, written.hashes),
        )
        _refuse_lost(report, config)
        files.write_sealed_json(target / REPORT, {"format": 1, **asdict(report)})
    return report


def _check_binding(
    adapter: AdapterFolder, facts: Mapping[str, Any], allowed: Sequence[str]
) -> list[str]:
    changes = fact_changes(adapter.facts, facts, ("base", "tokenizer"))
    return refuse(changes, allowed, where=str(adapter.path), error=MergeError)


def _refuse_merged_before(adapters: Sequence[AdapterFolder], base_folder: Path) -> None:
    report = base_folder / REPORT
    if not report.is_file():
        return
    try:
        before = files.read_sealed_json(report).get("adapters", [])
    except (OSError, ValueError):
        return
    for adapter in adapters:
        if tensors_fingerprint(adapter.tensors) in before:
            raise MergeError(
                "this adapter is already merged into the base", where=str(base_folder),
                fix="name the base model it was trained on",
            )  # fmt: skip


def _refuse_no_effect(offlines: Sequence[MetaAdapter]) -> None:
    for offline in offlines:
        if has_no_effect(offline):
            raise MergeError(
                "the adapter has no effect: every correction is zero",
                where=str(offline.folder.path),
                fix="train it first",
            )


def _refuse_small_disk(out: Path, needed: int) -> None:
    from loratune.errors import StorageError

    free = files.free_bytes(out)
    if free < needed:
        raise StorageError(
            f"not enough disk: {needed:,} bytes needed, {free:,} free",
            where=str(out),
            fix="out=DIR",
        )


def _refuse_lost(report: MergeReport, config: MergeConfig) -> None:
    if report.delta_kept < config.min_delta_kept:
        raise MergeError(
            f"rounding kept only {report.delta_kept:.1%} of the correction",
            where=report.worst.module,
            fix="merge.dtype=float32, or lower merge.min_delta_kept",
        )


def _overall_kept(proofs: Sequence[ModuleProof]) -> float:
    whole = sum(proof.delta_norm**2 for proof in proofs)
    kept = sum(proof.delta_kept * proof.delta_norm**2 for proof in proofs)
    return kept / whole if whole else 1.0


def _write_index(target: Path, entries: Mapping[str, TensorEntry]) -> None:
    weight_map = {name: entry.file.name for name, entry in entries.items()}
    if set(weight_map.values()) == {SINGLE}:
        return
    size = sum(entry.end - entry.begin for entry in entries.values())
    files.write_json(target / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _write_config(base_folder: Path, target: Path, dtype: Dtype, *, unties: bool) -> None:
    config = files.read_json(base_folder / "config.json")
    if unties:
        config["tie_word_embeddings"] = False
    if dtype is not Dtype.auto:
        config["dtype"] = str(dtype)
        config.pop("torch_dtype", None)
    files.write_json(target / "config.json", config)


def _copy_side_files(base_folder: Path, target: Path) -> None:
    """Tokenizer, generation settings and the like, as they are."""
    for pattern in _COPIED:
        for path in sorted(base_folder.glob(pattern)):
            if path.name not in _NOT_COPIED and path.is_file():
                shutil.copyfile(path, target / path.name)


def _described_files(target: Path, known: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """sha256 and size of every file; the shards were hashed while they were written."""
    return {
        path.name: {
            "sha256": known.get(path.name) or files.sha256_file(path),
            "bytes": path.stat().st_size,
        }
        for path in sorted(target.iterdir())
        if path.is_file()
    }
