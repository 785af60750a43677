"""What a model is made of, from the numbers of its ``config.json`` alone: no torch, no weights."""

from loratune.architectures.base import Architecture, Numbers, OtherModule, Roles
from loratune.architectures.reading import (
    architecture_from_numbers,
    is_known_family,
    read_architecture,
)
from loratune.architectures.roles import ROLE_WORDS, roles_of

__all__ = [
    "ROLE_WORDS",
    "Architecture",
    "Numbers",
    "OtherModule",
    "Roles",
    "architecture_from_numbers",
    "is_known_family",
    "read_architecture",
    "roles_of",
]
