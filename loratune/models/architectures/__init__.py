"""What a model is made of, from the numbers of its ``config.json`` alone: no torch, no weights."""

from loratune.models.architectures.base import (
    STACKED_EXPERTS,
    Architecture,
    Numbers,
    OtherModule,
    names_module,
)
from loratune.models.architectures.families import (
    architecture_from_numbers,
    is_known_family,
)

__all__ = [
    "STACKED_EXPERTS",
    "Architecture",
    "Numbers",
    "OtherModule",
    "architecture_from_numbers",
    "is_known_family",
    "names_module",
]
