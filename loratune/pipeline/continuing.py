"""Settings of a run that continues an adapter: its structure is the file's, not the recipe's."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from loratune.adapter_files.peft_format import AdapterFolder
from loratune.config.convert import from_plain, read_recipe
from loratune.config.schema import RunConfig, TargetsConfig
from loratune.errors import ConfigError, LoratuneError, raise_together
from loratune.pipeline.loading import adapter_to_continue
from loratune.runs.run_dir import RunDir


def check_continued(config: RunConfig, keys: Collection[str]) -> None:
    """Stop at settings that cannot hold beside ``adapter_path``.

    Those that the command line sets, and those of the adapter that a recipe sets to something
    else than the variant's own default; a group's file stands for no choice of its own.

    Args:
        config: the recipe.
        keys: what the command line sets.

    Raises:
        ConfigError: one for each setting that differs from the adapter's.
    """
    folder = adapter_to_continue(config)
    if folder is None:
        return
    defaults = type(config.adapter)()
    errors: list[LoratuneError] = []
    for name, wanted, own in _differences(config, folder):
        group, _, setting = name.partition(".")
        in_recipe = group == "adapter" and wanted != getattr(defaults, setting)
        if (
            name in keys
            or (group == "targets" and group in keys)
            or (in_recipe and not config.resume)
        ):
            errors.append(
                ConfigError(
                    f"{name}={wanted} cannot hold: the adapter to continue has {own}",
                    where=f"adapter_path={config.adapter_path}",
                    fix=f"remove {name}, or train afresh without adapter_path",
                )
            )
    raise_together(errors)


def with_own_structure(config: RunConfig) -> RunConfig:
    """The recipe as it will be trained: rank, targets and the like of the adapter it continues.

    A run that is resumed keeps what it has recorded.

    Raises:
        LoratuneError: if the adapter cannot be read or has another structure.
    """
    if config.adapter_path is None:
        return config
    try:
        folder = adapter_to_continue(config)
    except LoratuneError:
        if config.resume is None:
            raise
        return config  # the run may be complete; if it is not, reading the adapter says why
    assert folder is not None
    recorded = _recorded(config)
    source = recorded or replace(config, adapter=folder.config, targets=folder.targets)
    names = (name.split(".") for name, _, _ in _differences(config, folder))
    own = {name: getattr(source.adapter, name) for group, name in names if group == "adapter"}
    return replace(config, adapter=replace(config.adapter, **own), targets=source.targets)


def _differences(config: RunConfig, folder: AdapterFolder) -> Iterator[tuple[str, Any, Any]]:
    """Settings of adapter and targets that the file decides otherwise: key, recipe's, file's."""
    for item in fields(config.adapter):
        wanted, own = getattr(config.adapter, item.name), getattr(folder.config, item.name)
        follows_rank = item.name == "alpha" and wanted is None and own == folder.config.rank
        if wanted != own and not follows_rank:
            yield f"adapter.{item.name}", wanted, own
    for item in fields(TargetsConfig):
        wanted, own = getattr(config.targets, item.name), getattr(folder.targets, item.name)
        if _in_order(wanted) != _in_order(own):
            yield f"targets.{item.name}", wanted, own


def _in_order(value: Any) -> Any:
    """Names in any order mean the same layers."""
    return sorted(value) if isinstance(value, list) else value


def _recorded(config: RunConfig) -> RunConfig | None:
    """The recipe of the run that is resumed, where it continued an adapter of this variant."""
    if config.resume is None or config.out is None:
        return None
    with contextlib.suppress(LoratuneError):
        recorded = from_plain(read_recipe(RunDir(Path(config.out)).recipe), RunConfig)
        if recorded.adapter_path and type(recorded.adapter) is type(config.adapter):
            return recorded
    return None
