"""An adapter and its layers without the base model's weights.

The base is built on torch's meta device from ``config.json``: names and shapes, no data.  The
adapter on it is real, so ΔW of every module can be computed one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.peft_format import AdapterFolder
from loratune.adapters.base import Adapter
from loratune.adapters.low_rank import LowRank
from loratune.errors import MergeError, ModelError, refused_as
from loratune.models.build import meta_base
from loratune.models.weights import read_one, tensor_entries
from loratune.surgery import WrappedModel


@dataclass(frozen=True)
class MetaAdapter:
    """An adapter on the base's names and shapes.

    Attributes:
        wrapped: meta model with real adapters.
        folder: the adapter as read.
        base_folder: the base model's files.
        prefix: what the base's files may leave out in front of a tensor's name.
        tied: whether the base's head shares the input embedding's weight.
        unties: whether merging must part the two.
        input_embedding: name of the input embedding module.
        output_head: name of the head module.
        vocabulary: rows that the embeddings have now, where the adapter's file resized them.
    """

    wrapped: WrappedModel
    folder: AdapterFolder
    base_folder: Path
    prefix: str
    tied: bool
    unties: bool
    input_embedding: str
    output_head: str
    vocabulary: int | None = None

    @property
    def rows(self) -> int:
        """Rows of the vocabulary, resized or not."""
        return _rows(self.wrapped.model)


def attach(base_folder: Path, folder: AdapterFolder) -> MetaAdapter:
    """Put an adapter on its base's names and shapes.

    Raises:
        LoratuneError: if it does not fit.
    """
    model: Any = meta_base(base_folder).eval()
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    names = {module: name for name, module in model.named_modules()}
    first = names.get(model.get_input_embeddings(), "")
    head = names.get(model.get_output_embeddings(), "")
    prefix, rows = str(getattr(model, "base_model_prefix", "")), _rows(model)
    entries = tensor_entries(base_folder)

    def read(wanted: str) -> Tensor:
        name = tensor_name(entries, wanted, prefix)
        if name is None and tied and wanted == f"{head}.weight":
            name = tensor_name(entries, f"{first}.weight", prefix)
        if name is None:
            raise ModelError(f"the base has no '{wanted}'", where=str(base_folder))
        return read_one(entries[name])

    with refused_as(MergeError):
        wrapped = wrap_for_loading(model, folder, read)
    touched = {*wrapped.adapters, *wrapped.saved_modules}
    unties = tied and not touched.isdisjoint({first, head}) and not _stay_tied(wrapped, first, head)
    vocabulary = None if _rows(model) == rows else _rows(model)
    return MetaAdapter(wrapped, folder, base_folder, prefix, tied, unties, first, head, vocabulary)


def _rows(model: Any) -> int:
    """Rows of the model's vocabulary."""
    return int(model.config.get_text_config().vocab_size)


def _stay_tied(wrapped: WrappedModel, first: str, head: str) -> bool:
    """Whether both embeddings are stored in full, or corrected, with the same numbers."""
    one, other = wrapped.saved_modules.get(first), wrapped.saved_modules.get(head)
    if one is not None and other is not None:
        return torch.equal(one.weight, other.weight)
    lower, upper = wrapped.adapters.get(first), wrapped.adapters.get(head)
    if not (isinstance(lower, LowRank) and isinstance(upper, LowRank)):
        return False
    pairs = zip(lower.products(), upper.products(), strict=True)
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


def tensor_name(entries: Sequence[str] | dict[str, Any], wanted: str, prefix: str) -> str | None:
    """The name under which the base's files hold a tensor; hubs often drop the model's prefix."""
    for name in (wanted, wanted.removeprefix(prefix + ".")):
        if name in entries:
            return name
    return None


def weight_source(offline: MetaAdapter, entries: dict[str, Any], module: str) -> str:
    """Name of the stored tensor that a module's weight comes from; a tied head's is the input's.

    Raises:
        MergeError: if the base's files do not hold it.
    """
    name = tensor_name(entries, f"{module}.weight", offline.prefix)
    if name is None and offline.tied and module == offline.output_head:
        name = tensor_name(entries, f"{offline.input_embedding}.weight", offline.prefix)
    if name is None:
        raise MergeError(f"the base has no weight for '{module}'", where="model.path")
    return name


def has_no_effect(adapter: MetaAdapter) -> bool:
    """Whether every correction is exactly zero, and no module was trained in full."""
    entries = tensor_entries(adapter.base_folder)

    def is_zero(module: str, layer: Adapter) -> bool:
        weight = layer.weight
        if layer.reads_base:
            weight = read_one(entries[weight_source(adapter, entries, module)])
        return not bool(layer.delta_weight(weight).any())

    layers = adapter.wrapped.adapters.items()
    return not adapter.wrapped.saved_modules and all(is_zero(*layer) for layer in layers)
