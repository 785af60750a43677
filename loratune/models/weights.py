"""A model folder's safetensors files, read without trusting them.

Every path stays inside the folder, every file is as long as its header says, and no pickled
file is ever opened.  The bytes are mapped, hashed and copied as they lie; torch is imported only
where a tensor is made of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.errors import LoratuneError, ModelError, SecurityError, raise_together
from loratune.models.dtypes import COMPUTED_IN, FLOATING, ITEM_BYTES, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
_HEADER_LIMIT = 100 << 20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: bytes ``begin`` to ``end`` of ``file``."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.end - self.begin


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Names, dtypes, shapes and places of a safetensors file's tensors.

    Raises:
        ModelError: if it is empty, truncated, a git-lfs pointer, or inconsistent.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if start.startswith(b"version "):
                raise ModelError(
                    "this is a git-lfs pointer, not the weights",
                    where=str(file),
                    fix="run `git lfs pull`",
                )
            length = int.from_bytes(start, "little") if len(start) == 8 else -1
            if length > _HEADER_LIMIT:
                raise ValueError(length)
            if not 0 < length <= size - 8:
                raise ModelError(_truncated(8 + max(length, 0), size), where=str(file), fix=_COPY)
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_unique_keys)
        return _entries(file, header, 8 + length, size)
    except FileNotFoundError as error:
        raise ModelError("the file is missing", where=str(file), fix=_COPY) from error
    except OSError as error:
        raise ModelError(f"cannot read: {error.strerror}", where=str(file)) from error
    except _DuplicateKeyError as error:
        raise ModelError(
            f"broken header: '{error}' occurs twice, and readers disagree on which one counts",
            where=str(file),
            fix=_COPY,
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError("not a safetensors file", where=str(file), fix=_COPY) from error


class _DuplicateKeyError(ValueError):
    """A key that occurs twice in one JSON object."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys each occur once."""
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [key for key, _ in pairs]
        raise _DuplicateKeyError(next(key for key, times in Counter(names).items() if times > 1))
    return values


_COPY = "copy or download it again"


def _truncated(need: int, have: int) -> str:
    return f"truncated: {have:,} bytes where at least {need:,} are needed"


def _entries(file: Path, header: Any, start: int, size: int) -> dict[str, TensorEntry]:
    entries = {}
    for name, item in header.items():
        if name == "__metadata__":
            continue
        begin, end = (start + int(offset) for offset in item["data_offsets"])
        shape = tuple(int(n) for n in item["shape"])
        count = math.prod(shape)
        if end > size:
            raise ModelError(_truncated(end, size), where=str(file), fix=_COPY)
        if begin < start or end - begin != count * ITEM_BYTES.get(item["dtype"], -1):
            raise ModelError(f"tensor '{name}' is inconsistent", where=str(file), fix=_COPY)
        entries[str(name)] = TensorEntry(str(name), file, item["dtype"], shape, begin, end)
    _check_gaps(file, entries, start, size)
    return entries


def _check_gaps(file: Path, entries: dict[str, TensorEntry], start: int, size: int) -> None:
    """The tensors must fill the file, each byte belonging to one of them."""
    place = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != place:
            kind = "overlap" if entry.begin < place else "leave a gap"
            raise ModelError(f"tensors {kind} at '{entry.name}'", where=str(file), fix=_COPY)
        place = entry.end
    if place != size:
        raise ModelError(f"{size - place:,} bytes too many", where=str(file), fix=_COPY)


def tensor_entries(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model folder, in file order.

    Raises:
        ModelError: missing folder, missing or broken files (all of them at once).
        SecurityError: an index that points outside, or only pickled weights.
    """
    return {
        name: entry for file in weight_files(folder) for name, entry in read_header(file).items()
    }


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, checked against its index.

    Where a single file lies beside the index and its shards, readers disagree on which of them
    counts (transformers reads the single one): both must hold the same.
    """
    if not folder.is_dir():
        raise ModelError("no such folder", where=str(folder), fix="set model.path")
    index, single = folder / INDEX, folder / SINGLE
    has_single = single.exists() or single.is_symlink()
    if index.is_file():
        whole = f"remove {INDEX} if {SINGLE} is whole, or complete the shards"
        shards = _indexed_files(folder, index, whole if has_single else _COPY)
        if has_single and single not in shards:
            _check_single(inside(folder, SINGLE), shards)
        return shards
    if has_single:
        return [inside(folder, SINGLE)]
    pickled = [name for name in PICKLED if (folder / name).exists()]
    if pickled:
        raise SecurityError(
            "only pickled weights are here, and pickle can run code",
            where=str(folder / pickled[0]),
            fix="convert them to safetensors where you trust them",
        )
    raise ModelError("no weights", where=str(folder), fix=f"expected {SINGLE} or {INDEX}")


def _indexed_files(folder: Path, index: Path, fix: str) -> list[Path]:
    try:
        weight_map = json.loads(index.read_bytes().decode("utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError("the index is broken", where=str(index), fix=fix) from error
    errors: list[LoratuneError] = []
    files = []
    for name in names:
        try:
            file = inside(folder, name)
            if not file.is_file():
                lost = sum(1 for value in weight_map.values() if value == name)
                raise ModelError(f"shard missing: {lost} tensors lost", where=str(file), fix=fix)
            missing = _missing_of(weight_map, name, file)
            if missing:
                raise ModelError(f"shard lacks '{missing[0]}'", where=str(file), fix=fix)
            files.append(file)
        except LoratuneError as error:
            errors.append(error)
    raise_together(errors)
    return files


def _check_single(single: Path, shards: list[Path]) -> None:
    """Compare a single file with the shards beside it, once for each state of the files.

    Raises:
        ModelError: naming both and the first tensor that differs.
    """
    paths = (single, *shards)
    stats = [path.stat() for path in paths]
    different = _first_difference(paths, tuple((s.st_size, s.st_mtime_ns) for s in stats))
    if different is not None:
        raise ModelError(
            f"{SINGLE} and the shards of {INDEX} disagree: '{different}' is not the same in both",
            where=str(single.parent),
            fix="remove the one that does not belong to this model",
        )


@lru_cache(maxsize=8)
def _first_difference(paths: tuple[Path, ...], _states: tuple[tuple[int, int], ...]) -> str | None:
    """The first tensor that is not the same in the first file and in the others together."""
    alone = read_header(paths[0])
    spread = {name: entry for path in paths[1:] for name, entry in read_header(path).items()}
    kinds = [{n: (e.dtype, e.shape) for n, e in entries.items()} for entries in (alone, spread)]
    if kinds[0] == kinds[1]:
        kinds = [dict[str, Any](hash_tensors(entries)) for entries in (alone, spread)]
    names = sorted(kinds[0].keys() | kinds[1].keys())
    return next((n for n in names if kinds[0].get(n) != kinds[1].get(n)), None)


def _missing_of(weight_map: dict[str, str], name: str, file: Path) -> list[str]:
    present = read_header(file)
    return sorted(t for t, value in weight_map.items() if value == name and t not in present)


_COPY_INTO = "put the file itself into the folder"


def inside(folder: Path, name: str) -> Path:
    """``folder/name``, which may not lead out of the folder.

    The one link allowed is the Hugging Face cache's own: ``snapshots/REV/FILE`` to ``blobs/HASH``.

    Raises:
        SecurityError: naming the path or the link; the file is not opened.
    """
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or name != Path(name).name:
        raise SecurityError(
            "a path leads out of the folder", where=f"{folder}: {name}", fix=_COPY_INTO
        )
    if path.is_symlink() and leads_out(folder, path):
        raise SecurityError("a link leads out of the folder", where=str(path), fix=_COPY_INTO)
    return path


def leads_out(folder: Path, path: Path) -> bool:
    """Whether a path, its links followed, ends outside a folder and its hub cache's ``blobs``."""
    target, home = path.resolve(), folder.resolve()
    cached = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    return not (target.is_relative_to(home) or cached)


def mapped(file: Path) -> memoryview:
    """The bytes of a file, read as they are needed, until the last view of them is dropped.

    The mapping is copy-on-write, so a tensor may lie in it: nothing done to it reaches the file.
    """
    with file.open("rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))


def tensor_in(entry: TensorEntry, content: memoryview) -> Tensor:
    """One tensor's value where it lies, in the mapped bytes of its file: nothing is copied."""
    import torch

    dtype = torch_dtype(entry.dtype)
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(content[entry.begin : entry.end], dtype=dtype).view(entry.shape)


def read_one(entry: TensorEntry) -> Tensor:
    """One tensor's value, in a mapping of its own."""
    return tensor_in(entry, mapped(entry.file))


def read_all(file: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by name, where it lies.

    Raises:
        ModelError: if it is missing or broken.
    """
    entries = read_header(file)
    content = mapped(file)
    return {name: tensor_in(entries[name], content) for name in sorted(entries)}


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite, in one quick pass: both reach the extremes."""
    import torch

    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def check_stored(entry: TensorEntry, content: memoryview) -> None:
    """Check that a stored weight holds numbers only.

    Args:
        entry: the tensor.
        content: the mapped bytes of its file.

    Raises:
        ModelError: naming it, how many of its numbers are not finite, and the first one's place.
    """
    if entry.dtype not in FLOATING:
        return
    tensor = tensor_in(entry, content)
    if is_finite(tensor):
        return
    bad = ~tensor.isfinite()
    first = [int(place) for place in bad.nonzero()[0]]
    raise ModelError(
        f"{int(bad.sum()):,} of {tensor.numel():,} numbers of '{entry.name}' are NaN or infinite, "
        f"the first at {first}",
        where=str(entry.file),
        fix="copy or download it again; a base that holds such numbers cannot be trained or merged",
    )


def drop_pages(content: memoryview, begin: int, end: int) -> None:
    """Give the memory of a part of a mapped file back; the file is read again if that is asked for.

    What was read would otherwise count as this process's memory until the whole file is done.
    """
    start = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    size = end // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size > 0 and isinstance(content.obj, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        content.obj.madvise(mmap.MADV_DONTNEED, start, size)


def tensor_hash(entry: TensorEntry, content: memoryview) -> str:
    """Hex sha256 of one tensor's bytes in the mapped file."""
    return hashlib.sha256(content[entry.begin : entry.end]).hexdigest()


def hash_tensors(
    entries: Mapping[str, TensorEntry],
    check: Callable[[TensorEntry, memoryview], None] | None = None,
) -> dict[str, str]:
    """Hex sha256 per tensor, several tensors at a time (hashing releases the interpreter).

    Args:
        entries: the tensors.
        check: called with each tensor and the mapped bytes of its file while they are at hand.

    Raises:
        LoratuneError: whatever ``check`` raised, for all tensors of a file at once.
    """
    hashes: dict[str, str] = {}
    by_file: dict[Path, list[TensorEntry]] = {}
    for entry in entries.values():
        by_file.setdefault(entry.file, []).append(entry)
    for file, of_file in by_file.items():
        errors: list[LoratuneError] = []
        hash_one = partial(_hash_and_drop, content=mapped(file), check=check, errors=errors)
        with ThreadPoolExecutor(max_workers=2) as pool:
            results = pool.map(hash_one, of_file)
            hashes.update(zip((entry.name for entry in of_file), results, strict=True))
        raise_together(errors)
    return hashes


def _hash_and_drop(
    entry: TensorEntry,
    content: memoryview,
    check: Callable[[TensorEntry, memoryview], None] | None,
    errors: list[LoratuneError],
) -> str:
    sha256 = tensor_hash(entry, content)
    if check is not None:
        try:
            check(entry, content)
        except LoratuneError as error:
            errors.append(error)
    drop_pages(content, entry.begin, entry.end)
    return sha256


def stored_dtype(entries: Iterable[TensorEntry]) -> str:
    """The format of a model's weights: that of the first tensor that it can be loaded in."""
    return next((entry.dtype for entry in entries if entry.dtype in COMPUTED_IN), "F32")
