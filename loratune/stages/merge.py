"""Write base + adapter as one plain model folder, shard by shard, with its proof."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune import files
from loratune.config.schema import Dtype, MergeConfig
from loratune.drift import fact_changes, refuse
from loratune.errors import MergeError
from loratune.fingerprint import combine_hashes, tensors_fingerprint
from loratune.merge_proof import LogitsProof, prove_logits, wants_logits
from loratune.merging import ModuleProof, merged_weight
from loratune.offline_adapter import OfflineAdapter, attach, is_zero, tensor_name, weight_source
from loratune.peft_format import AdapterFolder
from loratune.provenance import package_versions
from loratune.safetensors_writer import ITEM_BYTES, SafetensorsWriter, TensorPlan
from loratune.weights import INDEX, SINGLE, TensorEntry, mapped, tensor_entries, tensor_hash

REPORT = "merge_report.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {Dtype.float32: "F32", Dtype.float16: "F16", Dtype.bfloat16: "BF16"}
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


class _Merge:
    """One merge in progress; the public face is ``merge``."""

    def __init__(
        self, adapters: Sequence[AdapterFolder], base_folder: Path, config: MergeConfig
    ) -> None:
        self.base_folder, self.config = base_folder, config
        self.entries = tensor_entries(base_folder)
        self.offline = [attach(base_folder, adapter) for adapter in adapters]
        self.unties = any(offline.unties for offline in self.offline)
        self.changed = self._changed_modules()
        self.saved = self._saved_tensors()
        self.proofs: list[ModuleProof] = []
        self.base_hashes: dict[str, str] = {}
        self.merged_hashes: dict[str, str] = {}
        self.merged_entries: dict[str, TensorEntry] = {}

    def _changed_modules(self) -> dict[str, str]:
        """Output tensor name to module, for every adapted weight."""
        changed: dict[str, str] = {}
        for offline in self.offline:
            for module in offline.wrapped.adapters:
                source = weight_source(offline, self.entries, module)
                is_tied_head = offline.tied and module == offline.output_head
                changed[f"{module}.weight" if is_tied_head else source] = module
        return changed

    def _saved_tensors(self) -> dict[str, Tensor]:
        """Output tensor name to trained value, for modules trained in full."""
        saved: dict[str, Tensor] = {}
        for offline in self.offline:
            for module, layer in offline.wrapped.saved_modules.items():
                for key, value in layer.trained_module.state_dict().items():
                    wanted = f"{module}.{key}"
                    name = tensor_name(self.entries, wanted, offline.prefix) or wanted
                    if name in saved:
                        raise MergeError(
                            "two adapters both trained this module in full", where=module
                        )
                    saved[name] = value.detach()
        return saved

    def outputs(self) -> list[tuple[str, TensorEntry]]:
        """Every tensor to write: its name and the base tensor it comes from, in file order."""
        written = [(name, entry) for name, entry in self.entries.items()]
        first = self.offline[0]
        head = f"{first.output_head}.weight"
        if self.unties and head not in self.entries:
            source = weight_source(first, self.entries, first.output_head)
            written.append((head, self.entries[source]))
        missing = sorted((self.changed.keys() | self.saved.keys()) - {name for name, _ in written})
        if missing:
            raise MergeError(f"the base has no tensor '{missing[0]}'", where=str(self.base_folder))
        return written

    def out_dtype(self, entry: TensorEntry) -> str:
        """safetensors dtype of an output tensor; only floating ones are converted."""
        if self.config.dtype is Dtype.auto or entry.dtype not in _DTYPES:
            return entry.dtype
        return _NAMES[self.config.dtype]

    def write(self, target: Path) -> dict[str, str]:
        """Write every shard; return tensor name to file name."""
        weight_map: dict[str, str] = {}
        outputs = self.outputs()
        files_in_order = list(dict.fromkeys(entry.file for entry in self.entries.values()))
        extra = outputs[len(self.entries) :]
        for file in files_in_order:
            own = [item for item in outputs[: len(self.entries)] if item[1].file == file]
            own += extra if file == files_in_order[-1] else []
            self._write_file(target / file.name, file, own)
            weight_map.update({name: file.name for name, _ in own})
        return weight_map

    def _write_file(self, path: Path, source: Path, items: list[tuple[str, TensorEntry]]) -> None:
        plans = [self._plan(name, entry) for name, entry in items]
        offset = 0
        needed = dict.fromkeys([source, *(entry.file for _, entry in items)])
        with _mapped_files(needed) as contents, files.storage_errors(path):
            with SafetensorsWriter(path, plans, {"format": "pt"}) as writer:
                for (name, entry), plan in zip(items, plans, strict=True):
                    content = contents[entry.file]
                    self.base_hashes.setdefault(entry.name, tensor_hash(entry, content))
                    self._write_tensor(writer, name, entry, content)
                    end = offset + plan.size
                    self.merged_entries[name] = TensorEntry(
                        name, path, plan.dtype, plan.shape, offset, end
                    )
                    offset = end

    def _plan(self, name: str, entry: TensorEntry) -> TensorPlan:
        dtype = self.out_dtype(entry)
        size = entry.end - entry.begin
        if dtype != entry.dtype:
            size = size // ITEM_BYTES[entry.dtype] * ITEM_BYTES[dtype]
        return TensorPlan(name, dtype, entry.shape, size)

    def _write_tensor(
        self, writer: SafetensorsWriter, name: str, entry: TensorEntry, content: memoryview
    ) -> None:
        dtype = self.out_dtype(entry)
        with content[entry.begin : entry.end] as view:
            if name not in self.changed and name not in self.saved and dtype == entry.dtype:
                writer.write(view)
                self.merged_hashes[name] = self.base_hashes[entry.name]
                return
            result = self._new_value(name, entry, view).contiguous()
        data = result.view(torch.uint8).reshape(-1).numpy().data
        self.merged_hashes[name] = files.sha256_bytes(data)
        writer.write(data)

    def _new_value(self, name: str, entry: TensorEntry, view: memoryview) -> Tensor:
        dtype = _DTYPES.get(self.out_dtype(entry))
        if dtype is None:
            raise MergeError(f"weights of type {entry.dtype} cannot be merged", where=name)
        if name in self.saved:
            return self.saved[name].reshape(entry.shape).to(dtype)
        # A copy: a mapped file is read-only, which torch's views are not.
        stored = torch.frombuffer(bytearray(view), dtype=_DTYPES[entry.dtype]).view(entry.shape)
        if name not in self.changed:
            return stored.to(dtype)
        module = self.changed[name]
        layers = [o.wrapped.adapters[module] for o in self.offline if module in o.wrapped.adapters]
        merged, proof = merged_weight(stored, layers, dtype)
        self.proofs.append(proof)
        return merged


class _mapped_files:  # noqa: N801  used like a function
    """Several mapped files at once."""

    def __init__(self, paths: Mapping[Path, None]) -> None:
        from contextlib import ExitStack

        self._paths, self._stack = paths, ExitStack()

    def __enter__(self) -> dict[Path, memoryview]:
        return {path: self._stack.enter_context(mapped(path)) for path in self._paths}

    def __exit__(self, *details: object) -> None:
        self._stack.close()


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
    work = _Merge(adapters, base_folder, config)
    _refuse_no_effect(work.offline)
    needed = sum(entry.end - entry.begin for entry in work.entries.values())
    _refuse_small_disk(out, needed)
    with files.published_folder(out) as target:
        weight_map = work.write(target)
        base = combine_hashes(work.entries, work.base_hashes)
        facts = {"base": base, "tokenizer": tokenizer}
        drift = [line for a in adapters for line in _check_binding(a, facts, allow_drift)]
        _write_index(target, weight_map, work.merged_entries)
        _write_config(base_folder, target, config.dtype, unties=work.unties)
        _copy_side_files(base_folder, target)
        logits = None
        if wants_logits(config.verify, adapters, needed):
            logits = prove_logits(base_folder, adapters[0], target)
        report = MergeReport(
            base=base,
            adapters=[tensors_fingerprint(adapter.tensors) for adapter in adapters],
            tokenizer=tokenizer,
            merged=combine_hashes(work.merged_entries, work.merged_hashes),
            dtype="base" if config.dtype is Dtype.auto else str(config.dtype),
            untied=work.unties,
            modules=work.proofs,
            logits=logits,
            delta_kept=_overall_kept(work.proofs),
            seconds=time.perf_counter() - started,
            drift=drift,
            versions=package_versions(),
            files=_described_files(target),
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


def _refuse_no_effect(offlines: Sequence[OfflineAdapter]) -> None:
    for offline in offlines:
        layers = offline.wrapped.adapters.values()
        if not offline.wrapped.saved_modules and all(is_zero(layer) for layer in layers):
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
            f"not enough disk: {needed:,} bytes needed, {free:,} free", where=str(out), fix="out=DIR"
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


def _write_index(
    target: Path, weight_map: Mapping[str, str], entries: Mapping[str, TensorEntry]
) -> None:
    if set(weight_map.values()) == {SINGLE}:
        return
    size = sum(entry.end - entry.begin for entry in entries.values())
    files.write_json(
        target / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(weight_map)}
    )


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


def _described_files(target: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"sha256": files.sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(target.iterdir())
        if path.is_file()
    }
