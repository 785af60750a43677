"""Write a merge shard by shard: one tensor in memory at a time, every byte hashed on the way."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from loratune import files
from loratune.fingerprint import combine_hashes
from loratune.merge_plan import MergePlan
from loratune.merging import ModuleProof
from loratune.safetensors_writer import ITEM_BYTES, SafetensorsWriter, TensorPlan
from loratune.weights import TensorEntry, mapped, tensor_hash


@dataclass(frozen=True)
class WrittenModel:
    """What was read and written.

    Attributes:
        base: fingerprint of the base's weights, hashed while they were read.
        merged: fingerprint of the merged weights, hashed while they were written.
        proofs: of every merged module.
        entries: the written tensors.
        hashes: file name to sha256 of every shard written.
    """

    base: str
    merged: str
    proofs: list[ModuleProof]
    entries: dict[str, TensorEntry]
    hashes: dict[str, str]


def write_merged(plan: MergePlan, target: Path) -> WrittenModel:
    """Write every shard of a merge into an existing folder.

    While one thread writes, a second hashes what was read and flushes what was written.

    Raises:
        MergeError: if a module does not prove itself.
        StorageError: if the disk refuses.
    """
    with ThreadPoolExecutor(max_workers=1) as helper:
        writer = _Writer(plan, target, helper)
        for source, items in plan.outputs().items():
            writer.write_file(source, items)
        return writer.finish()


class _Writer:
    def __init__(self, plan: MergePlan, target: Path, helper: ThreadPoolExecutor) -> None:
        self._plan, self._target, self._helper = plan, target, helper
        self._base: dict[str, Future[str]] = {}
        self._merged: dict[str, str | Future[str]] = {}
        self._entries: dict[str, TensorEntry] = {}
        self._proofs: list[ModuleProof] = []
        self._hashes: dict[str, str] = {}
        self._flushes: list[Future[None]] = []

    def write_file(self, source: Path, items: list[tuple[str, TensorEntry]]) -> None:
        path = self._target / source.name
        plans = [self._tensor_plan(name, entry) for name, entry in items]
        needed = [source, *(entry.file for _, entry in items)]
        # The mapping must outlive the hashing beside it, also when a tensor is refused.
        with (
            _mapped_files(needed) as contents,
            self._hashing_awaited(),
            files.storage_errors(path),
            SafetensorsWriter(path, plans, {"format": "pt"}) as writer,
        ):
            offset = 0
            for (name, entry), plan in zip(items, plans, strict=True):
                self._write_tensor(writer, name, entry, contents[entry.file])
                end = offset + plan.size
                self._entries[name] = TensorEntry(name, path, plan.dtype, plan.shape, offset, end)
                offset = end
        self._hashes[path.name] = writer.sha256
        self._flushes.append(self._helper.submit(files.sync_file, path))

    @contextmanager
    def _hashing_awaited(self) -> Iterator[None]:
        try:
            yield
        finally:
            wait(self._base.values())

    def _tensor_plan(self, name: str, entry: TensorEntry) -> TensorPlan:
        dtype = self._plan.out_dtype(entry)
        size = entry.end - entry.begin
        if dtype != entry.dtype:
            size = size // ITEM_BYTES[entry.dtype] * ITEM_BYTES[dtype]
        return TensorPlan(name, dtype, entry.shape, size)

    def _write_tensor(
        self, writer: SafetensorsWriter, name: str, entry: TensorEntry, content: memoryview
    ) -> None:
        if entry.name not in self._base:
            self._base[entry.name] = self._helper.submit(tensor_hash, entry, content)
        with content[entry.begin : entry.end] as view:
            if self._plan.is_copied(name, entry):
                self._merged[name] = self._base[entry.name]
                writer.write(view)
                return
            result, proof = self._plan.value(name, entry, view)
        data = result.contiguous().view(torch.uint8).reshape(-1).numpy().data
        self._merged[name] = files.sha256_bytes(data)
        writer.write(data)
        if proof is not None:
            self._proofs.append(proof)

    def finish(self) -> WrittenModel:
        for flush in self._flushes:
            flush.result()
        base = {name: future.result() for name, future in self._base.items()}
        merged = {
            name: value if isinstance(value, str) else value.result()
            for name, value in self._merged.items()
        }
        return WrittenModel(
            combine_hashes(self._plan.entries, base),
            combine_hashes(self._entries, merged),
            self._proofs,
            self._entries,
            self._hashes,
        )


@contextmanager
def _mapped_files(paths: list[Path]) -> Iterator[dict[Path, memoryview]]:
    with ExitStack() as stack:
        yield {path: stack.enter_context(mapped(path)) for path in dict.fromkeys(paths)}
