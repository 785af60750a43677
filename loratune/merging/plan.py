"""Which tensors a merged model has, which base tensor each comes from, and what is added to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from loratune.adapter_files.offline import attach, tensor_name, weight_source
from loratune.adapter_files.peft_format import AdapterFolder
from loratune.adapters.base import Adapter
from loratune.config.schema import Dtype
from loratune.errors import MergeError
from loratune.merging.weight import ModuleProof, merged_weight
from loratune.models.dtypes import COMPUTED_IN, ITEM_BYTES, safetensors_name, torch_dtype
from loratune.models.weights import TensorEntry, is_finite, tensor_entries, tensor_in


class MergePlan:
    """What becomes of every tensor of a base model when adapters are merged into it.

    Attributes:
        base_folder: the base model's files.
        entries: the base's tensors.
        offline: the adapters on the base's names and shapes.
        vocabulary: rows of the embeddings, where an adapter resized them.
        unties: whether head and input embedding must part.
        sources: output tensor name to the base tensor it comes from.
        layers: output tensor name to the corrections added to it, in the adapters' order.
        trained: output tensor name to its value, for modules trained in full.

    Raises:
        LoratuneError: an adapter that does not fit the base, or changes a tensor that the base
            does not have.
    """

    def __init__(
        self, adapters: Sequence[AdapterFolder], base_folder: Path, dtype: Dtype = Dtype.auto
    ) -> None:
        self.base_folder, self._dtype = base_folder, dtype
        self.entries = tensor_entries(base_folder)
        self.offline = [attach(base_folder, adapter) for adapter in adapters]
        sizes = [one.vocabulary for one in self.offline if one.vocabulary is not None]
        self.vocabulary = max(sizes, default=None)
        self.unties = any(offline.unties for offline in self.offline)
        self.sources = self._sources()
        self.layers = self._layers()
        self.trained = self._trained_tensors()
        missing = sorted((self.layers.keys() | self.trained.keys()) - self.sources.keys())
        if missing:
            raise MergeError(f"the base has no tensor '{missing[0]}'", where=str(base_folder))

    def _sources(self) -> dict[str, TensorEntry]:
        """The base's tensors, and a head of its own where it must part from the embedding."""
        sources = dict(self.entries)
        first = self.offline[0]
        head = f"{first.output_head}.weight"
        if self.unties and head not in sources:
            sources[head] = self.entries[weight_source(first, self.entries, first.output_head)]
        return sources

    def _layers(self) -> dict[str, list[Adapter]]:
        layers: dict[str, list[Adapter]] = {}
        for offline in self.offline:
            for module, layer in offline.wrapped.adapters.items():
                source = weight_source(offline, self.entries, module)
                is_tied_head = offline.tied and module == offline.output_head
                if is_tied_head and not self.unties:
                    continue  # the input embedding's correction, added once
                layers.setdefault(f"{module}.weight" if is_tied_head else source, []).append(layer)
        return layers

    def _trained_tensors(self) -> dict[str, Tensor]:
        trained: dict[str, Tensor] = {}
        for offline in self.offline:
            for module, layer in offline.wrapped.saved_modules.items():
                is_tied_head = offline.tied and module == offline.output_head
                if is_tied_head and not self.unties:
                    continue  # the input embedding's number, stored once
                for key, value in layer.trained_module.state_dict().items():
                    full_name = f"{module}.{key}"
                    name = tensor_name(self.entries, full_name, offline.prefix) or full_name
                    if name in trained:
                        raise MergeError(
                            "two adapters both trained this module in full", where=module
                        )
                    trained[name] = value.detach()
        return trained

    def out_entries(self, folder: Path) -> dict[Path, list[TensorEntry]]:
        """The tensors to write to each file, one for each of the base's; places are from 0."""
        shards: dict[Path, list[TensorEntry]] = {entry.file: [] for entry in self.entries.values()}
        last = list(shards)[-1]
        for name, source in self.sources.items():
            file = source.file if name in self.entries else last
            dtype = self._out_dtype(source)
            begin = shards[file][-1].end if shards[file] else 0
            shape = self._out_shape(name, source)
            size = math.prod(shape) * ITEM_BYTES[dtype]
            entry = TensorEntry(name, folder / file.name, dtype, shape, begin, begin + size)
            shards[file].append(entry)
        return {folder / file.name: entries for file, entries in shards.items()}

    def _out_shape(self, name: str, source: TensorEntry) -> tuple[int, ...]:
        """The base's, or that of a vocabulary which the adapter resized."""
        trained = self.trained.get(name)
        same = trained is None or trained.numel() == math.prod(source.shape)
        return source.shape if trained is None or same else tuple(trained.shape)

    def _out_dtype(self, source: TensorEntry) -> str:
        """Safetensors dtype of an output tensor; only floating ones are converted."""
        if self._dtype is Dtype.auto or source.dtype not in COMPUTED_IN:
            return source.dtype
        return safetensors_name(self._dtype)

    def is_copied(self, entry: TensorEntry) -> bool:
        """Whether an output tensor's bytes are the base's."""
        changes = entry.name in self.layers or entry.name in self.trained
        return not changes and entry.dtype == self.sources[entry.name].dtype

    def value(self, entry: TensorEntry, content: memoryview) -> tuple[Tensor, ModuleProof | None]:
        """The new value of a tensor that is not copied, and its proof if it was merged.

        Args:
            entry: the output tensor.
            content: the bytes of the base file that it comes from.

        Raises:
            MergeError: a dtype that cannot be merged, or a proof that fails.
        """
        name, source = entry.name, self.sources[entry.name]
        if entry.dtype not in COMPUTED_IN:
            raise MergeError(f"weights of type {source.dtype} cannot be merged", where=name)
        dtype = torch_dtype(entry.dtype)
        if name in self.trained:
            return self.trained[name].reshape(entry.shape).to(dtype), None
        stored = tensor_in(source, content)
        if name not in self.layers:
            cast = stored.to(dtype)
            if not is_finite(cast):
                raise MergeError(
                    f"a number of the base is too large for {dtype}",
                    where=name,
                    fix="merge.dtype=auto",
                )
            return cast, None
        return merged_weight(stored, self.layers[name], dtype)
