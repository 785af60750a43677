"""What the command line says beside the recipe; no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratune.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """What the command line says beside the recipe.

    Attributes:
        variants: see ``contenders``.
        match: see ``matched``.
        seeds: how many final trainings each setting gets; 0 for a search alone.
        lr_grid: learning rates for every variant, instead of a grid around its own.
        ratio_grid: values of the setting that a variant searches beside its rate (LoRA+'s ratio),
            instead of the recipe's.
        processes: how many work on it here.
        part: ``(K, N)``: this process is the Kth of N that were started separately.
        retry: do failed pieces again.
        folders: the user's recipe folders.
    """

    variants: Any = "all"
    match: str = "own"
    seeds: int = 3
    lr_grid: Sequence[float] | None = None
    ratio_grid: Sequence[float] | None = None
    processes: int = 1
    part: tuple[int, int] = (1, 1)
    retry: bool = False
    folders: Sequence[Path] = field(default=())


def parse_part(text: str) -> tuple[int, int]:
    """``2/4`` as ``(2, 4)``.

    Raises:
        ConfigError: if it is not K/N with 1 <= K <= N.
    """
    parsed = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    number, count = (int(parsed[1]), int(parsed[2])) if parsed else (0, 0)
    if not 1 <= number <= count:
        raise ConfigError(
            f"part must be K/N, not '{text}'", where="part", fix="use part=1/4 to part=4/4"
        )
    return number, count
