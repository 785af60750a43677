"""Write a merge shard by shard: a few tensors in memory at a time, every byte hashed on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from loratune import files
from loratune.merging.plan import MergePlan
from loratune.merging.safetensors_writer import ITEM_BYTES, SafetensorsWriter, TensorPlan
from loratune.merging.threads import in_order, tensor_threads
from loratune.merging.weight import ModuleProof
from loratune.models.fingerprint import combine_hashes
from loratune.models.weights import TensorEntry, drop_pages, mapped, tensor_hash


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


@dataclass(frozen=True)
class _Made:
    """A tensor ready to be written.

    Attributes:
        data: its bytes.
        base: sha256 of the base's bytes; ``None`` if another tensor took it.
        merged: sha256 of ``data``; ``None`` if it is the base's.
        proof: of a merged weight.
    """

    data: memoryview
    base: str | None
    merged: str | None
    proof: ModuleProof | None


def write_merged(plan: MergePlan, target: Path) -> WrittenModel:
    """Write every shard of a merge into an existing folder.

    Some threads hash, merge and prove the next tensors while this one writes the last.

    Raises:
        MergeError: if a module does not prove itself.
        StorageError: if the disk refuses.
    """
    with tensor_threads() as pool:
        writer = _Writer(plan, target, pool)
        for source, items in plan.outputs().items():
            writer.write_file(source, items)
        return writer.finish()


class _Writer:
    def __init__(self, plan: MergePlan, target: Path, pool: ThreadPoolExecutor) -> None:
        self._plan, self._target, self._pool = plan, target, pool
        self._base: dict[str, str] = {}
        self._merged: dict[str, str] = {}
        self._entries: dict[str, TensorEntry] = {}
        self._proofs: list[ModuleProof] = []
        self._hashes: dict[str, str] = {}
        self._flushes: list[Future[None]] = []

    def write_file(self, source: Path, items: list[tuple[str, TensorEntry]]) -> None:
        path = self._target / source.name
        plans = [self._tensor_plan(name, entry) for name, entry in items]
        contents = {file: mapped(file) for file in {entry.file for _, entry in items}}
        made = in_order(self._pool, self._jobs(items, contents))
        with (
            files.storage_errors(path),
            SafetensorsWriter(path, plans, {"format": "pt"}) as writer,
        ):
            offset = 0
            for (name, entry), plan, tensor in zip(items, plans, made, strict=True):
                writer.write(tensor.data)
                drop_pages(contents[entry.file], entry.begin, entry.end)
                self._note(name, entry, tensor)
                end = offset + plan.size
                self._entries[name] = TensorEntry(name, path, plan.dtype, plan.shape, offset, end)
                offset = end
        self._hashes[path.name] = writer.sha256
        self._flushes.append(self._pool.submit(files.sync_file, path))

    def _tensor_plan(self, name: str, entry: TensorEntry) -> TensorPlan:
        dtype = self._plan.out_dtype(entry)
        size = entry.end - entry.begin
        if dtype != entry.dtype:
            size = size // ITEM_BYTES[entry.dtype] * ITEM_BYTES[dtype]
        return TensorPlan(name, dtype, entry.shape, size)

    def _jobs(
        self, items: list[tuple[str, TensorEntry]], contents: Mapping[Path, memoryview]
    ) -> Iterator[Callable[[], _Made]]:
        hashed = set(self._base)
        for name, entry in items:
            is_new = entry.name not in hashed
            hashed.add(entry.name)
            yield partial(self._make, name, entry, contents[entry.file], hashes_base=is_new)

    def _make(
        self, name: str, entry: TensorEntry, content: memoryview, *, hashes_base: bool
    ) -> _Made:
        base = tensor_hash(entry, content) if hashes_base else None
        if self._plan.is_copied(name, entry):
            return _Made(content[entry.begin : entry.end], base, None, None)
        result, proof = self._plan.value(name, entry, content)
        data = result.contiguous().view(torch.uint8).reshape(-1).numpy().data
        return _Made(data, base, files.sha256_bytes(data), proof)

    def _note(self, name: str, entry: TensorEntry, tensor: _Made) -> None:
        if tensor.base is not None:
            self._base[entry.name] = tensor.base
        self._merged[name] = tensor.merged or self._base[entry.name]
        if tensor.proof is not None:
            self._proofs.append(tensor.proof)

    def finish(self) -> WrittenModel:
        for flush in self._flushes:
            flush.result()
        return WrittenModel(
            combine_hashes(self._plan.entries, self._base),
            combine_hashes(self._entries, self._merged),
            self._proofs,
            self._entries,
            self._hashes,
        )
