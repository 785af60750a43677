"""An existing adapter as the start of a new run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loratune.adapter_files.peft_config import structure_of
from loratune.adapter_files.peft_format import AdapterFolder, read_adapter
from loratune.config.convert import to_plain
from loratune.config.schema import RunConfig
from loratune.errors import ConfigError


def adapter_to_continue(config: RunConfig) -> AdapterFolder | None:
    """The adapter of ``adapter_path``, under the recipe's training settings.

    Its structure (rank, alpha, targets) is the file's; learning rates, kernel and the like are
    the recipe's.  Variants of one structure can continue each other.

    Raises:
        ConfigError: if the recipe's variant has another structure.
    """
    if config.adapter_path is None:
        return None
    folder = read_adapter(Path(config.adapter_path))
    wanted, stored = structure_of(type(config.adapter)), structure_of(type(folder.config))
    if wanted != stored:
        raise ConfigError(
            f"the adapter is {stored}, the recipe's variant '{config.adapter.variant}' is {wanted}",
            where=f"adapter_path={config.adapter_path}",
            fix=f"set adapter={folder.config.variant}",
        )
    recorded = to_plain(config.adapter)
    return replace(folder, config=type(config.adapter).from_peft(folder.peft, recorded))
