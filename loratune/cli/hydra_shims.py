"""Two things that Hydra 1.3 does slowly, done once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra

from loratune.config.recipes.folders import group_options
from loratune.config.settings import GROUPS


@contextmanager
def quick_hydra(arguments: Sequence[str], folders: Sequence[Path]) -> Iterator[None]:
    """Hydra without its second composition and without its slow listing of groups.

    Hydra composes everything twice, the first time to read ``hydra.mode``, which here only a word
    of the command line sets; and its ``--help`` copies the whole configuration for every folder.
    """
    kept = Hydra.get_mode, Hydra.format_config_groups
    if not any(word.lstrip("+").startswith("hydra.mode") for word in arguments):
        Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    if "--hydra-help" not in arguments:
        Hydra.format_config_groups = _groups(folders)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode, Hydra.format_config_groups = kept  # type: ignore[method-assign]


def _groups(folders: Sequence[Path]) -> Callable[..., str]:
    def listed(*_: Any, **__: Any) -> str:
        return "\n".join(f"  {name}: {', '.join(group_options(name, folders))}" for name in GROUPS)

    return listed
