"""Which tensors a merge writes, and the value of each that changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from loratune.adapter_files.offline import attach, tensor_name, weight_source
from loratune.adapter_files.peft_format import AdapterFolder
from loratune.config.schema import Dtype
from loratune.errors import MergeError
from loratune.merging.weight import ModuleProof, merged_weight
from loratune.models.tensors import DTYPES, tensor_in
from loratune.models.weights import TensorEntry, tensor_entries

_MERGED = {name: DTYPES[name] for name in ("F32", "F16", "BF16")}
_NAMES = {Dtype.float32: "F32", Dtype.float16: "F16", Dtype.bfloat16: "BF16"}


class MergePlan:
    """What becomes of every tensor of a base model when adapters are merged into it.

    Attributes:
        base_folder: the base model's files.
        entries: the base's tensors.
        offline: the adapters on the base's names and shapes.
        unties: whether head and input embedding must part.
    """

    def __init__(self, adapters: Sequence[AdapterFolder], base_folder: Path, dtype: Dtype) -> None:
        self.base_folder, self._dtype = base_folder, dtype
        self.entries = tensor_entries(base_folder)
        self.offline = [attach(base_folder, adapter) for adapter in adapters]
        self.unties = any(offline.unties for offline in self.offline)
        self._changed = self._changed_modules()
        self._saved = self._saved_tensors()

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

    def outputs(self) -> dict[Path, list[tuple[str, TensorEntry]]]:
        """Per file of the base: the tensors to write, each with the base tensor it comes from.

        Raises:
            MergeError: if an adapter changes a tensor that the base does not have.
        """
        outputs: dict[Path, list[tuple[str, TensorEntry]]] = {}
        for name, entry in self.entries.items():
            outputs.setdefault(entry.file, []).append((name, entry))
        first = self.offline[0]
        head = f"{first.output_head}.weight"
        if self.unties and head not in self.entries:
            source = self.entries[weight_source(first, self.entries, first.output_head)]
            outputs[list(outputs)[-1]].append((head, source))
        written = {name for items in outputs.values() for name, _ in items}
        missing = sorted((self._changed.keys() | self._saved.keys()) - written)
        if missing:
            raise MergeError(f"the base has no tensor '{missing[0]}'", where=str(self.base_folder))
        return outputs

    def out_dtype(self, entry: TensorEntry) -> str:
        """Safetensors dtype of an output tensor; only floating ones are converted."""
        if self._dtype is Dtype.auto or entry.dtype not in _MERGED:
            return entry.dtype
        return _NAMES[self._dtype]

    def is_copied(self, name: str, entry: TensorEntry) -> bool:
        """Whether the tensor's bytes are the base's."""
        changes = name in self._changed or name in self._saved
        return not changes and self.out_dtype(entry) == entry.dtype

    def value(
        self, name: str, entry: TensorEntry, content: memoryview
    ) -> tuple[Tensor, ModuleProof | None]:
        """The new value of a tensor that is not copied, and its proof if it was merged.

        Args:
            name: of the output tensor.
            entry: the base tensor it comes from.
            content: the bytes of that tensor's file.

        Raises:
            MergeError: a dtype that cannot be merged, or a proof that fails.
        """
        dtype = _MERGED.get(self.out_dtype(entry))
        if dtype is None:
            raise MergeError(f"weights of type {entry.dtype} cannot be merged", where=name)
        if name in self._saved:
            return self._saved[name].reshape(entry.shape).to(dtype), None
        stored = tensor_in(entry, content)
        if name not in self._changed:
            return stored.to(dtype), None
        module = self._changed[name]
        layers = [o.wrapped.adapters[module] for o in self.offline if module in o.wrapped.adapters]
        return merged_weight(stored, layers, dtype)
