"""Which tensors a merged model has, which base tensor each comes from, and what is added to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from loratune.adapter_files.offline import MetaAdapter, attach
from loratune.adapter_files.peft_format import AdapterFolder
from loratune.adapters.base import Adapter
from loratune.config.schema import Dtype
from loratune.errors import MergeError
from loratune.merging.converted import ConvertedTensors, is_proved
from loratune.merging.weight import ModuleProof, merged_weight, replaced_weight
from loratune.models.dtypes import COMPUTED_IN, ITEM_BYTES, safetensors_name, torch_dtype
from loratune.models.stored_names import StoredGroup
from loratune.models.weights import TensorEntry, is_finite, read_one, tensor_entries, tensor_in
from loratune.surgery import trained_values


class MergePlan:
    """What becomes of every tensor of a base model when adapters are merged into it.

    Attributes:
        base_folder: the base model's files.
        entries: the base's tensors.
        offline: the adapters on the base's names and shapes.
        vocabulary: rows of the embeddings, where an adapter resized them.
        parted: parameters that share a tensor in the base and get one each.
        sources: output tensor name to the base tensor it comes from.
        layers: output tensor name to the corrections added to it, in the adapters' order.
        trained: output tensor name to its value, for modules trained in full.
        converted: output tensor name to the group that it is merged with, where transformers
            loads it in another form.

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
        self._names = self.offline[0].names
        sizes = [one.vocabulary for one in self.offline if one.vocabulary is not None]
        self.vocabulary = max(sizes, default=None)
        self.parted = frozenset[str]().union(*(offline.parted for offline in self.offline))
        self.sources = self._sources()
        self.layers: dict[str, list[Adapter]] = {}
        self.trained: dict[str, Tensor] = {}
        self._parameters: dict[str, str] = {}  # of an output tensor trained in full
        self.converted: dict[str, ConvertedTensors] = {}
        for offline in self.offline:
            self._add_layers(offline)
            self._add_trained(offline)
            self._add_biases(offline)
        self._check_overlap()

    @property
    def notices(self) -> list[str]:
        """What the adapters' files name that has no effect on this base."""
        return [line for one in self.offline for line in one.wrapped.match.notices]

    def _sources(self) -> dict[str, TensorEntry]:
        """The base's tensors, and one more for each parameter that must have its own."""
        sources = dict(self.entries)
        for parameter in sorted(self.parted):
            if self._names.own(parameter) is None:
                _, group = self._place(parameter)
                sources[parameter] = self.entries[group.stored[0]]
        return sources

    def _place(self, parameter: str) -> tuple[str, StoredGroup]:
        """What a parameter is read from, and its name there.

        Raises:
            MergeError: if it cannot be written back.
        """
        problem = self._names.problem_of(parameter, alone=parameter in self.parted)
        place = self._names.stored_as(parameter)
        if place is None or problem:
            fix = "leave the layer out with targets.exclude, and train again"
            raise MergeError(f"'{parameter}': {problem}", where=str(self.base_folder), fix=fix)
        return place

    def _output(self, parameter: str) -> str | tuple[str, ConvertedTensors]:
        """The output tensor that is the parameter, or its name in the group that holds it."""
        if parameter in self.parted and self._names.own(parameter) is None:
            return parameter
        name, group = self._place(parameter)
        if group.conversion is None:
            return group.stored[0]
        known = self.converted.get(group.stored[0]) or ConvertedTensors(group)
        self.converted.update(dict.fromkeys(group.stored, known))
        return name, known

    def _add_layers(self, offline: MetaAdapter) -> None:
        for layer in offline.wrapped.adapters.values():
            if layer.trained_parameters() or self._is_added_already(offline, layer.shape.parameter):
                continue
            output = self._output(layer.shape.parameter)
            if isinstance(output, str):
                self.layers.setdefault(output, []).append(layer)
            else:
                name, converted = output
                converted.layers.setdefault(name, []).append(layer)

    def _is_added_already(self, offline: MetaAdapter, parameter: str) -> bool:
        """Whether another name of the same tensor, corrected alike, comes before this one."""
        adapted = {layer.shape.parameter for layer in offline.wrapped.adapters.values()}
        shared = [one for one in self._names.shared.get(parameter, ()) if one in adapted]
        return parameter not in self.parted and bool(shared) and shared[0] != parameter

    def _add_trained(self, offline: MetaAdapter) -> None:
        before = {id(value) for value in self._trained_values()}
        for parameter, value in trained_values(offline.wrapped).items():
            output = self._output(parameter)
            if isinstance(output, str):
                name, values = output, self.trained
                self._parameters.setdefault(name, parameter)
            else:
                name, values = output[0], output[1].trained
            if name in values and id(values[name]) in before:
                module = parameter.rpartition(".")[0]
                raise MergeError("two adapters both trained this module in full", where=module)
            values[name] = value

    def _check_overlap(self) -> None:
        """A tensor that one adapter trained in full has no place for another's correction."""
        both = self.trained.keys() & self.layers.keys()
        for group in self.converted.values():
            both |= group.trained.keys() & group.layers.keys()
        for name in sorted(both):
            raise MergeError("one adapter trained it in full, another corrects it", where=name)

    @torch.no_grad()
    def _add_biases(self, offline: MetaAdapter) -> None:
        for module, layer in offline.wrapped.adapters.items():
            if not layer.corrects_bias:
                continue
            output = self._output(f"{module}.bias")
            name, values = (
                (output, self.trained)
                if isinstance(output, str)
                else (output[0], output[1].trained)
            )
            if name in values:
                raise MergeError("two adapters both change this bias", where=module)
            self._parameters.setdefault(name, f"{module}.bias")
            bias = self._names.read(f"{module}.bias")
            values[name] = bias.float() + layer.delta_bias(bias).float()

    def _trained_values(self) -> list[Tensor]:
        groups = self.converted.values()
        return [*self.trained.values(), *(v for group in groups for v in group.trained.values())]

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

    def parameter_of(self, output: str) -> str | None:
        """The parameter that an output tensor becomes, under the first of its names.

        ``None`` where transformers reads nothing of it.
        """
        if output not in self.entries:
            return output
        parameter = self._names.parameter_of(output)
        if parameter is None or parameter in self.parted:
            return parameter
        return self._names.shared.get(parameter, (parameter,))[0]

    def is_copied(self, entry: TensorEntry) -> bool:
        """Whether an output tensor's bytes are the base's."""
        changed = (self.layers, self.trained, self.converted)
        changes = any(entry.name in names for names in changed)
        return not changes and entry.dtype == self.sources[entry.name].dtype

    def value(self, entry: TensorEntry, content: memoryview) -> tuple[Tensor, list[ModuleProof]]:
        """The new value of a tensor that is not copied, and the proofs of what was merged for it.

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
        if name in self.converted:
            return self.converted[name].merged(name, self._read, dtype)
        stored = tensor_in(source, content)
        if name in self.trained:
            trained = self.trained[name].reshape(entry.shape)
            return replaced_weight(stored, trained, dtype, self._parameters[name])
        if name not in self.layers:
            cast = stored.to(dtype)
            if not is_finite(cast):
                raise MergeError(
                    f"a number of the base is too large for {dtype}",
                    where=name,
                    fix="merge.dtype=auto",
                )
            return cast, []
        merged, proof = merged_weight(stored, self.layers[name], dtype)
        return merged, [proof]

    def _read(self, name: str) -> Tensor:
        """A tensor of the base."""
        return read_one(self.entries[name])

    def is_as_planned(self, name: str, merged: Mapping[str, TensorEntry]) -> bool:
        """Whether a tensor of a merged model is what the base and the adapters make of it.

        Args:
            name: of the tensor.
            merged: the merged model's tensors.
        """
        if name not in self.sources:
            return False
        if name in self.converted:
            first = name == self.converted[name].group.stored[0]  # once for the whole group
            return not first or self.converted[name].is_merged(
                self._read, lambda one: read_one(merged[one])
            )
        value = read_one(merged[name])
        if name in self.trained:
            return torch.equal(self.trained[name].reshape(value.shape).to(value.dtype), value)
        base = read_one(self.sources[name])
        if name not in self.layers:
            return torch.equal(base.to(value.dtype), value)
        return is_proved(base, self.layers[name], value)
