"""Put a fresh or an existing adapter into a loaded base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loratune.adapter_files.peft_format import AdapterFolder, read_adapter, wrap_for_loading
from loratune.adapters.config import AdapterConfig
from loratune.config.schema import TargetsConfig
from loratune.errors import ModelError
from loratune.surgery import WrappedModel, wrap_model


def wrap(model: Any, config: AdapterConfig, targets: TargetsConfig, seed: int) -> WrappedModel:
    """Freeze the model and put a fresh adapter on its targets.

    Raises:
        LoratuneError: if a target matches nothing or cannot be adapted.
    """
    return wrap_model(model, config, targets, seed=seed)


def wrap_existing(model: Any, folder: Path | AdapterFolder) -> tuple[WrappedModel, AdapterFolder]:
    """Put an adapter that lies on disk into the model.

    Raises:
        LoratuneError: if it is missing, damaged, unsupported or does not fit the model.
    """
    adapter = folder if isinstance(folder, AdapterFolder) else read_adapter(folder)
    try:
        wrapped = wrap_for_loading(model, adapter)
    except ModelError as error:
        error.where = error.where or str(adapter.path)
        raise
    return wrapped, adapter
