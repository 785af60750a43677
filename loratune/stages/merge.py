"""Write base + adapter as one plain model folder, shard by shard, with its proof."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from loratune import files
from loratune.adapter_files.offline import MetaAdapter, has_no_effect
from loratune.adapter_files.peft_format import AdapterFolder
from loratune.adapter_files.tokenizer import own_tokenizer
from loratune.config.schema import Dtype, MergeConfig, Verify
from loratune.data.templates import PromptFormat
from loratune.errors import MergeError, StorageError
from loratune.generation import folder_stop_ids
from loratune.merging.folder import complete_folder, write_ends
from loratune.merging.logits import LogitsProof, prove_logits, wants_logits
from loratune.merging.plan import MergePlan
from loratune.merging.weight import ModuleProof
from loratune.merging.writer import write_merged
from loratune.models.fingerprint import tensors_fingerprint
from loratune.models.load import has_tokenizer, load_tokenizer
from loratune.runs.drift import check_binding
from loratune.runs.manifest import CARD, describe_files
from loratune.runs.provenance import package_versions
from loratune.runs.run_dir import MERGE_REPORT


@dataclass(frozen=True)
class MergeReport:
    """The certificate of a merge; ``merge_report.json`` holds the same.

    Attributes:
        base: fingerprint of the base's weights.
        adapters: fingerprint of each adapter's tensors.
        tokenizer: fingerprint recorded with the first adapter, if any.
        dtype: of the merged weights where it was changed, else ``base``.
        untied: whether head and input embedding had to part.
        modules: the proof of every changed module.
        logits: the whole model's proof, if it was made.
        delta_kept: share of all corrections that survived rounding.
        files: name to sha256 and bytes of every file written.
        drift: differences from what was recorded that were allowed.
        notes: what to know about the folder, one sentence each.
        quantized: where the adapter's base was quantized, which weights it was merged into, and
            how the result compares with what was trained.
    """

    base: str
    adapters: list[str]
    tokenizer: str | None
    dtype: str
    untied: bool
    modules: list[ModuleProof]
    logits: LogitsProof | None
    delta_kept: float
    seconds: float
    drift: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    quantized: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def worst(self) -> ModuleProof:
        """The module that lost most to rounding."""
        return max(self.modules, key=lambda proof: proof.residual)


Card = Callable[[MergeReport], str]
"""The certificate to the text of a README.md."""


def merge(
    adapters: Sequence[AdapterFolder],
    base_folder: Path,
    out: Path,
    config: MergeConfig,
    *,
    tokenizer: str | None = None,
    allow_drift: Sequence[str] = (),
    recorded_as: Callable[[str], str] | None = None,
    compare: Callable[[Path], dict[str, Any]] | None = None,
    card: Card | None = None,
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
        recorded_as: gives what the adapters recorded of a base whose weights have a fingerprint,
            where that is not the fingerprint itself.
        compare: looks at the merged folder before it appears; what it returns is certified.
        card: writes the folder's README.md from the certificate.

    Raises:
        MergeError: wrong base, an adapter without effect, or a proof that fails.
        StorageError: if the disk refuses.
    """
    started = time.perf_counter()
    plan = _checked_plan(adapters, base_folder, out, config.dtype)
    own, note = _own_tokenizer(plan)
    with files.published_folder(out) as target:
        written = write_merged(plan, target)
        base = recorded_as(written.base) if recorded_as else written.base
        drift = _check_bindings(adapters, base, tokenizer, allow_drift)
        complete_folder(
            base_folder,
            target,
            written.entries,
            config.dtype,
            unties=bool(plan.parted),
            vocabulary=plan.vocabulary,
            tokenizer=own,
        )
        _write_ends(target, adapters[0])
        report = MergeReport(
            base=written.base,
            adapters=[tensors_fingerprint(adapter.tensors) for adapter in adapters],
            tokenizer=tokenizer,
            dtype="base" if config.dtype is Dtype.auto else str(config.dtype),
            untied=bool(plan.parted),
            modules=written.proofs,
            logits=_logits_proof(plan, adapters, target, config.verify),
            delta_kept=_overall_kept(written.proofs),
            seconds=time.perf_counter() - started,
            drift=drift,
            notes=[*plan.notices, *([note] if note else [])],
            quantized=compare(target) if compare else None,
            versions=package_versions(),
        )
        _require_kept(report, config)
        if card is not None:
            files.write_text(target / CARD, card(report))
        described = describe_files(target.iterdir(), written.file_hashes)
        report = replace(report, files=described)
        files.write_sealed_json(target / MERGE_REPORT, {"format": 1, **asdict(report)})
    return report


def _checked_plan(
    adapters: Sequence[AdapterFolder], base_folder: Path, out: Path, dtype: Dtype
) -> MergePlan:
    """What is to be written, once everything that can stop it beforehand was looked at."""
    files.check_outside(out, base_folder, *(adapter.path for adapter in adapters))
    _check_not_merged(adapters, base_folder)
    plan = MergePlan(adapters, base_folder, dtype)
    _require_effect(plan.offline)
    _require_space(plan, out)
    return plan


def _own_tokenizer(plan: MergePlan) -> tuple[Path | None, str]:
    """The folder of the first adapter with a tokenizer for tokens of its own, or a note."""
    found = [
        own_tokenizer(one.folder, one.rows, resized=one.vocabulary is not None)
        for one in plan.offline
    ]
    return next((own for own in found if any(own)), (None, ""))


def _check_not_merged(adapters: Sequence[AdapterFolder], base_folder: Path) -> None:
    report = base_folder / MERGE_REPORT
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


def _write_ends(target: Path, adapter: AdapterFolder) -> None:
    """Every token that ends an answer, the chat template's of training too."""
    recorded = adapter.facts.get("prompt_format")
    prompt_format = PromptFormat.from_dict(recorded) if recorded else None
    if has_tokenizer(target):
        tokenizer = load_tokenizer(target)
        write_ends(target, folder_stop_ids(target, tokenizer, prompt_format))


def _require_effect(offlines: Sequence[MetaAdapter]) -> None:
    for offline in offlines:
        if has_no_effect(offline):
            raise MergeError(
                "the adapter has no effect: every correction is zero",
                where=str(offline.folder.path),
                fix="train it first",
            )


def _require_space(plan: MergePlan, out: Path) -> None:
    shards = plan.out_entries(out).values()
    needed, free = sum(entry.size for shard in shards for entry in shard), files.free_bytes(out)
    if free < needed:
        raise StorageError(
            f"not enough disk: {needed:,} bytes needed, {free:,} free",
            where=str(out),
            fix="out=DIR",
        )


def _check_bindings(
    adapters: Sequence[AdapterFolder], base: str, tokenizer: str | None, allowed: Sequence[str]
) -> list[str]:
    accepted: list[str] = []
    for adapter in adapters:
        facts, where = adapter.facts, str(adapter.path)
        accepted += check_binding(facts, base, tokenizer, allowed, where=where, error=MergeError)
    return accepted


def _logits_proof(
    plan: MergePlan, adapters: Sequence[AdapterFolder], target: Path, verify: Verify
) -> LogitsProof | None:
    if not wants_logits(verify, adapters, plan.entries):
        return None
    return prove_logits(plan.base_folder, adapters[0], target)


def _require_kept(report: MergeReport, config: MergeConfig) -> None:
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
