"""A model folder's safetensors files, read without trusting them.

Every path stays inside the folder, every file is as long as its header says, and no pickled
file is ever opened.  No torch here: the bytes are mapped, hashed and copied as they lie.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.errors import LoratuneError, ModelError, SecurityError, raise_together

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
_HEADER_LIMIT = 100 << 20
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: bytes ``begin`` to ``end`` of ``file``."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


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
                    "this is a git-lfs pointer, not the weights", where=str(file), fix="run `git lfs pull`"
                )
            length = int.from_bytes(start, "little") if len(start) == 8 else -1
            if not 0 < length <= min(_HEADER_LIMIT, size - 8):
                raise ModelError(_truncated(8 + max(length, 0), size), where=str(file), fix=_COPY)
            header = json.loads(stream.read(length).decode("utf-8"))
        return _entries(file, header, 8 + length, size)
    except FileNotFoundError as error:
        raise ModelError("the file is missing", where=str(file), fix=_COPY) from error
    except OSError as error:
        raise ModelError(f"cannot read: {error.strerror}", where=str(file)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError("this is no safetensors file", where=str(file), fix=_COPY) from error


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
        count = 1
        for n in shape:
            count *= n
        if end > size:
            raise ModelError(_truncated(end, size), where=str(file), fix=_COPY)
        if begin < start or end - begin != count * _ITEM_BYTES.get(item["dtype"], -1):
            raise ModelError(f"tensor '{name}' is inconsistent", where=str(file), fix=_COPY)
        entries[str(name)] = TensorEntry(str(name), file, item["dtype"], shape, begin, end)
    return entries


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
    """The safetensors files of a model folder, checked against its index."""
    if not folder.is_dir():
        raise ModelError("the model folder does not exist", where=str(folder), fix="set model.path")
    index = folder / INDEX
    if index.is_file():
        return _indexed_files(folder, index)
    single = folder / SINGLE
    if single.exists() or single.is_symlink():
        return [_inside(folder, SINGLE)]
    pickled = [name for name in PICKLED if (folder / name).exists()]
    if pickled:
        raise SecurityError(
            "only pickled weights are here, and pickle can run code",
            where=str(folder / pickled[0]),
            fix="convert them to safetensors where you trust them",
        )
    raise ModelError("no weights", where=str(folder), fix=f"expected {SINGLE} or {INDEX}")


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_bytes().decode("utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError("the index is broken", where=str(index), fix=_COPY) from error
    errors: list[LoratuneError] = []
    found = []
    for name in names:
        try:
            file = _inside(folder, name)
            if not file.is_file():
                lost = sum(1 for value in weight_map.values() if value == name)
                raise ModelError(f"shard missing: {lost} tensors lost", where=str(file), fix=_COPY)
            missing = _missing_of(weight_map, name, file)
            if missing:
                raise ModelError(f"shard lacks '{missing[0]}'", where=str(file), fix=_COPY)
            found.append(file)
        except LoratuneError as error:
            errors.append(error)
    raise_together(errors)
    return found


def _missing_of(weight_map: dict[str, str], name: str, file: Path) -> list[str]:
    present = read_header(file)
    return sorted(t for t, value in weight_map.items() if value == name and t not in present)


def _inside(folder: Path, name: str) -> Path:
    """``folder/name``, refused if it leads out of the folder.

    The one link allowed is the Hugging Face cache's own: ``snapshots/REV/FILE`` to ``blobs/HASH``.
    """
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or name != Path(name).name:
        raise SecurityError("a path leads out of the model folder", where=f"{folder}: {name}")
    target = path.resolve()
    home = folder.resolve()
    cached = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if path.is_symlink() and target.parent != home and not cached:
        raise SecurityError("a link leads out of the model folder", where=str(path))
    return path


@contextmanager
def mapped(file: Path) -> Iterator[memoryview]:
    """The bytes of a file, mapped read-only."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m:
        view = memoryview(m)
        try:
            yield view
        finally:
            view.release()


def tensor_hash(entry: TensorEntry, content: memoryview) -> str:
    """Hex sha256 of one tensor's bytes in the mapped file."""
    with content[entry.begin : entry.end] as view:
        return hashlib.sha256(view).hexdigest()


def hash_tensors(entries: dict[str, TensorEntry]) -> dict[str, str]:
    """Hex sha256 per tensor, several tensors at a time (hashing releases the interpreter)."""
    hashes: dict[str, str] = {}
    for file in dict.fromkeys(entry.file for entry in entries.values()):
        of_file = [entry for entry in entries.values() if entry.file == file]
        with mapped(file) as content, ThreadPoolExecutor(max_workers=2) as pool:
            results = pool.map(lambda entry: tensor_hash(entry, content), of_file)
            hashes.update(zip((entry.name for entry in of_file), results, strict=True))
    return hashes
