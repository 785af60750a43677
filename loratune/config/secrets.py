"""What must never be recorded: tokens, keys and passwords."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = frozenset(
    {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey"}
)
_KEY_OWNERS = frozenset({"api", "access", "private", "secret", "signing", "encryption"})
_MODEL_TOKENS = frozenset({"pad", "bos", "eos", "unk", "sep", "cls", "mask", "image"})
_SHORTEST = 6
"""Environment values shorter than this would hide ordinary words."""

_KNOWN_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|AKIA[0-9A-Z]{16}|xox[abp]-[A-Za-z0-9-]{10,})"
)
_USER_INFO = re.compile(r"(://[^/\s:@]*:)[^/\s@]+(@)")
_ASSIGNMENT = re.compile(r"""([\w.-]+)(["']?\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s,;}\]]+)""")


def is_secret_key(key: str) -> bool:
    """Whether a key names a secret: ``hf_token``, ``logger.api_key``, ``AWS_SECRET_ACCESS_KEY``.

    ``max_new_tokens`` and ``pad_token`` are not secrets.
    """
    words = [word.casefold() for word in _WORD.findall(key.rsplit(".", 1)[-1])]
    if _SECRET_WORDS & set(words):
        return True
    pairs = set(itertools.pairwise(words))
    if any((owner, "key") in pairs for owner in _KEY_OWNERS):
        return True
    return words[-1:] == ["token"] and words[-2:-1] not in [[word] for word in _MODEL_TOKENS]


def environment_secrets() -> list[str]:
    """Values of environment variables whose names say that they are secret, longest first."""
    values = {
        value
        for name, value in os.environ.items()
        if is_secret_key(name) and len(value) >= _SHORTEST
    }
    return sorted(values, key=len, reverse=True)


def redact(value: Any) -> Any:
    """``value`` with every secret replaced by ``***``; mappings, lists and tuples are copied."""
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if is_secret_key(str(key)) and _holds_text(item) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(redact(item) for item in value)
    return redact_text(value) if isinstance(value, str) else value


def _holds_text(value: Any) -> bool:
    return value is not None and not isinstance(value, bool) and value not in ("", "???")


def redact_text(text: str) -> str:
    """``text`` with secrets of the environment, known token shapes and ``key=secret`` hidden."""
    for secret in environment_secrets():
        text = text.replace(secret, HIDDEN)
    text = _KNOWN_SHAPES.sub(HIDDEN, text)
    text = _USER_INFO.sub(rf"\1{HIDDEN}\2", text)
    return _ASSIGNMENT.sub(_hide_assignment, text)


def _hide_assignment(match: re.Match[str]) -> str:
    key, between, value = match.groups()
    hidden = is_secret_key(key) and value not in ("null", "None", "''", '""', "???")
    return f"{key}{between}{HIDDEN if hidden else value}"
