"""Write a merge shard by shard: a few tensors in memory at a time, every byte hashed on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from loratune import files
from loratune.merging.plan import MergePlan
from loratune.merging.safetensors_writer import SafetensorsWriter
from loratune.merging.threads import in_order, tensor_threads
from loratune.merging.weight import ModuleProof
from loratune.models.fingerprint import combine_hashes
from loratune.models.weights import TensorEntry, check_stored, drop_pages, mapped, tensor_hash


@dataclass
class WrittenModel:
    """What was read and written.

    Attributes:
        plan: what was to be written.
        entries: the written tensors.
        base_hashes: base tensor name to sha256, taken while they were read.
        proofs: of every merged module.
        file_hashes: file name to sha256 of every shard written.
    """

    plan: MergePlan
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    base_hashes: dict[str, str] = field(default_factory=dict)
    proofs: list[ModuleProof] = field(default_factory=list)
    file_hashes: dict[str, str] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """Fingerprint of the base's weights."""
        return combine_hashes(self.plan.entries, self.base_hashes)


@dataclass(frozen=True)
class _EncodedTensor:
    """A tensor ready to be written.

    Attributes:
        data: its bytes.
        base: sha256 of the base's bytes; ``None`` if another tensor took it.
        proofs: of what was merged for it.
    """

    data: memoryview
    base: str | None
    proofs: Sequence[ModuleProof] = ()


def write_merged(plan: MergePlan, target: Path) -> WrittenModel:
    """Write every shard of a merge into an existing folder.

    Some threads hash, merge and prove the next tensors while this one writes the last.

    Raises:
        MergeError: if a module does not prove itself.
        StorageError: if the disk refuses.
    """
    written = WrittenModel(plan)
    flushes: list[Future[None]] = []
    with tensor_threads() as pool:
        for path, entries in plan.out_entries(target).items():
            _write_file(path, entries, written, pool)
            flushes.append(pool.submit(files.sync_file, path))
        for flush in flushes:
            flush.result()
    return written


def _write_file(
    path: Path, entries: Sequence[TensorEntry], written: WrittenModel, pool: ThreadPoolExecutor
) -> None:
    sources = [written.plan.sources[entry.name] for entry in entries]
    contents = {file: mapped(file) for file in {source.file for source in sources}}
    encoded = in_order(pool, _jobs(written, entries, contents))
    with files.storage_errors(path), closing(SafetensorsWriter(path, entries)) as writer:
        for entry, source, tensor in zip(entries, sources, encoded, strict=True):
            writer.write(tensor.data)
            drop_pages(contents[source.file], source.begin, source.end)
            if tensor.base is not None:
                written.base_hashes[source.name] = tensor.base
            written.entries[entry.name] = entry
            written.proofs += tensor.proofs
    written.file_hashes[path.name] = writer.sha256


def _jobs(
    written: WrittenModel, entries: Sequence[TensorEntry], contents: Mapping[Path, memoryview]
) -> Iterator[Callable[[], _EncodedTensor]]:
    hashed = set(written.base_hashes)
    for entry in entries:
        source = written.plan.sources[entry.name]
        is_new = source.name not in hashed
        hashed.add(source.name)
        yield partial(_encode, written.plan, entry, contents[source.file], hashes_base=is_new)


def _encode(
    plan: MergePlan, entry: TensorEntry, content: memoryview, *, hashes_base: bool
) -> _EncodedTensor:
    source = plan.sources[entry.name]
    base = tensor_hash(source, content) if hashes_base else None
    if hashes_base:
        check_stored(source, content)
    if plan.is_copied(entry):
        return _EncodedTensor(content[source.begin : source.end], base)
    result, proofs = plan.value(entry, content)
    data = result.contiguous().view(torch.uint8).reshape(-1).numpy().data
    return _EncodedTensor(data, base, proofs)
