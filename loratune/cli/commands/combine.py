"""``loratune combine``: the weighted sum of several adapters as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.cli.inputs import adapter_folder, names_base, recorded_recipe
from loratune.config.command_line import CommandLine
from loratune.config.schema import RunConfig
from loratune.errors import ConfigError


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, and what to combine."""

    run: Any = None
    """Run folders, ``[A,B]``: their adapters and the first one's base are taken."""
    adapter_path: Any = None
    """Adapter folders, ``[A,B]``, in place of runs."""
    weights: Any = None
    """A factor on each adapter, ``[0.5,0.5]``; null averages them."""
    out: str | None = None
    """The folder to write; null is combined, here."""


def run(config: Config, command_line: CommandLine) -> None:
    """Write Σ weight · ΔW of the adapters as one plain LoRA of the summed rank."""
    runs, paths = _listed(config.run), _listed(config.adapter_path)
    if bool(runs) == bool(paths):
        fix = "set run=[A,B] or adapter_path=[A,B]"
        raise ConfigError("which adapters?", where="run, adapter_path", fix=fix)
    folders = [adapter_folder(one, None) for one in runs] or [Path(path) for path in paths]
    weights = _numbers(config.weights, len(folders))
    out = Path(config.out or "combined")
    first = runs[0] if runs else None
    config = recorded_recipe(config, command_line, first)
    from loratune.pipeline import commands

    base_named = names_base(command_line.keys, first)
    commands.combine_adapters(config, folders, weights, out, base_named=base_named)


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]


def _numbers(value: Any, count: int) -> Sequence[float]:
    """The weights as given, or equal shares.

    Raises:
        ConfigError: if one is not a number.
    """
    if value is None:
        return [1 / count] * count
    try:
        return [float(one) for one in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError) as error:
        cause = f"{value} are not weights"
        raise ConfigError(cause, where="weights", fix="write weights=[0.5,0.5]") from error
