"""An adapter and its layers without the base model's weights.

The base is built on torch's meta device from ``config.json``: names and shapes, no data.  The
adapter on it is real, so ΔW of every module can be computed one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.peft_format import AdapterFolder
from loratune.adapter_files.writing_back import parted_names
from loratune.adapters.base import Adapter
from loratune.errors import MergeError, refused_as
from loratune.models.build import meta_base
from loratune.models.stored_names import StoredNames
from loratune.models.weights import tensor_entries
from loratune.surgery import WrappedModel


@dataclass(frozen=True)
class MetaAdapter:
    """An adapter on the base's names and shapes.

    Attributes:
        wrapped: meta model with real adapters.
        folder: the adapter as read.
        base_folder: the base model's files.
        names: what the base's files call the model's parameters.
        parted: parameters that get a tensor of their own, where merging must part shared ones;
            empty where nothing is parted.
        vocabulary: rows that the embeddings have now, where the adapter's file resized them.
    """

    wrapped: WrappedModel
    folder: AdapterFolder
    base_folder: Path
    names: StoredNames
    parted: frozenset[str]
    vocabulary: int | None = None

    @property
    def rows(self) -> int:
        """Rows of the vocabulary, resized or not."""
        return _rows(self.wrapped.model)

    @property
    def config(self) -> Any:
        """The language model's configuration, as transformers understands it."""
        model: Any = self.wrapped.model
        return model.config.get_text_config()

    @property
    def unties(self) -> bool:
        """Whether parameters that share a tensor in the base must part."""
        return bool(self.parted)


def attach(base_folder: Path, folder: AdapterFolder) -> MetaAdapter:
    """Put an adapter on its base's names and shapes.

    Raises:
        LoratuneError: if it does not fit.
    """
    model: Any = meta_base(base_folder).eval()
    names = StoredNames(model, tensor_entries(base_folder))
    rows = _rows(model)
    with refused_as(MergeError):
        wrapped = wrap_for_loading(model, folder, names.read)
        parted = parted_names(base_folder, names, wrapped)
    vocabulary = None if _rows(model) == rows else _rows(model)
    return MetaAdapter(wrapped, folder, base_folder, names, parted, vocabulary)


def _rows(model: Any) -> int:
    """Rows of the model's vocabulary."""
    return int(model.config.get_text_config().vocab_size)


def has_no_effect(adapter: MetaAdapter) -> bool:
    """Whether every correction is exactly zero, and no module was trained in full."""

    def is_zero(module: str, layer: Adapter) -> bool:
        weight = adapter.names.read(layer.shape.parameter) if layer.reads_base else layer.weight
        return not bool(layer.delta_weight(weight).any())

    layers = adapter.wrapped.adapters.items()
    return not adapter.wrapped.saved_modules and all(is_zero(*layer) for layer in layers)
