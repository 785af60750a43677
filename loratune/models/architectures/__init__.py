"""What a model is made of, from the numbers of its ``config.json`` alone: no torch, no weights."""

from loratune.models.architectures.base import (
    STACKED_EXPERTS,
    Architecture,
    Numbers,
    OtherModule,
    Roles,
    names_module,
)
from loratune.models.architectures.families import (
    ROLE_WORDS,
    architecture_from_numbers,
    is_known_family,
    roles_of,
)

__all__ = [
    "ROLE_WORDS",
    "STACKED_EXPERTS",
    "Architecture",
    "Numbers",
    "OtherModule",
    "Roles",
    "architecture_from_numbers",
    "is_known_family",
    "names_module",
    "roles_of",
]
