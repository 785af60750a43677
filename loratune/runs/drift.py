"""What differs between what was recorded and what is there now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratune.adapters.registry import config_class, variant_names
from loratune.config.convert import flatten, to_plain
from loratune.config.mixture import by_name
from loratune.config.schema import RunConfig
from loratune.errors import CheckpointError, LoratuneError, raise_together

# Keys that do not change what is computed, or that a fact of its own stands for: fingerprints of
# content, the number of processes.
_IRRELEVANT = (
    "name", "out", "resume", "allow_drift", "trackers", "stages", "adapter_path", "evaluate",
    "merge", "export", "gate", "gguf", "data.path", "data.eval_path", "data.test_path",
    "data.cache", "model.path",
    "model.revision",
    "launch.nproc", "launch.max_restarts", "launch.timeout",
    "model.architecture", "trainer.keep_checkpoints", "trainer.save_every", "trainer.log_every",
)  # fmt: skip
_BINDING = ("base", "tokenizer")


@dataclass(frozen=True)
class Change:
    """One key whose value is not what was recorded."""

    key: str
    saved: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.saved)} → {_short(self.now)}"


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    is_hash = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if is_hash else text


def recipe_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Keys of two recipes that differ and matter to what is trained.

    A setting that did not exist when the first was recorded had what is its default now.
    """
    new, before = flatten(by_name(now)), flatten(by_name(saved))
    old = {key: value for key, value in _defaults(now).items() if key in new} | before
    keys = sorted(key for key in old.keys() | new.keys() if not _is_irrelevant(key))
    return [Change(k, old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)]


def _defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting that a recipe of this variant has, at its default."""
    variant = str((recipe.get("adapter") or {}).get("variant"))
    if variant not in variant_names():
        return {}
    return flatten(to_plain(RunConfig(adapter=config_class(variant)())))


def _is_irrelevant(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in _IRRELEVANT)


def fact_changes(
    saved: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]
) -> list[Change]:
    """Of ``keys``, those recorded and different now; what was never recorded cannot differ."""
    return [
        Change(key, saved[key], now.get(key))
        for key in keys
        if saved.get(key) is not None and saved[key] != now.get(key)
    ]


def check_drift(
    changes: Sequence[Change],
    allowed: Sequence[str],
    *,
    where: str,
    error: type[LoratuneError] = CheckpointError,
) -> list[str]:
    """Stop at every change that is not allowed; returns the changes that were allowed.

    Args:
        changes: what differs.
        allowed: keys of ``allow_drift``; a key allows everything below it.
        where: what was compared.
        error: kind to raise.

    Raises:
        LoratuneError: of that kind, one line ``key: saved → now`` per change.
    """

    def is_allowed(change: Change) -> bool:
        return any(change.key == key or change.key.startswith(key + ".") for key in allowed)

    raise_together(
        error(str(change), where=where, fix=f"undo it, or allow it with allow_drift=[{change.key}]")
        for change in changes
        if not is_allowed(change)
    )
    return [str(change) for change in changes]


def check_binding(
    recorded: Mapping[str, Any],
    base: str,
    tokenizer: str | None,
    allowed: Sequence[str],
    *,
    where: str,
    error: type[LoratuneError] = CheckpointError,
) -> list[str]:
    """Check that an adapter belongs to this base and tokenizer; returns the changes allowed.

    An adapter that does not say what it was trained on (PEFT's own) fits any, with a note.

    Args:
        recorded: the adapter's facts.
        base: fingerprint of the base's weights.
        tokenizer: fingerprint of the base's tokenizer.
        allowed: keys of ``allow_drift``.
        where: the adapter's folder.
        error: kind to raise.

    Raises:
        LoratuneError: of that kind, one line ``key: saved → now`` per change.
    """
    from loratune.runs import processes  # imports torch

    if "base" not in recorded:
        processes.say_once("note: this adapter does not say which base it was trained on")
    changes = fact_changes(recorded, {"base": base, "tokenizer": tokenizer}, _BINDING)
    accepted = check_drift(changes, allowed, where=where, error=error)
    processes.say_once(*(f"drift allowed: {line}" for line in accepted))
    return accepted
