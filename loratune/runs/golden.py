"""A run's golden prompts: what its model answers, to tell later whether a server serves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loratune import files
from loratune.errors import ConfigError, ModelError

BASE, ADAPTED = 0.0, 1.0
"""Strengths of the adapter that are the base and the adapted model."""


@dataclass(frozen=True)
class GoldenPrompt:
    """One prompt of the evaluation rows.

    Attributes:
        text: as training wrote it, special tokens spelt out, without the tokenizer's start token.
        messages: the turns that it was written from, role and content; empty where it is not a
            conversation, or has more than that.
        tokens: of the prompt, with the start token.
        adapted: the adapted model's greedy answer.
        base: the base model's; ``None`` where it was not asked.
        first: text of a token to its log-probability as the first of the answer, one for each of
            the record's strengths.
    """

    text: str
    messages: list[dict[str, str]]
    tokens: int
    adapted: str
    base: str | None
    first: dict[str, list[float]]


@dataclass(frozen=True)
class Golden:
    """The golden prompts of a run.

    Attributes:
        strengths: factors on the adapter's correction; 0 is the base, 1 the adapted model.
        max_new_tokens: longest answer.
        chat: whether prompts are conversations that a chat template writes.
        prompts: a handful.
    """

    strengths: list[float]
    max_new_tokens: int
    chat: bool
    prompts: list[GoldenPrompt]


def write_golden(path: Path, golden: Golden) -> None:
    """Write a run's golden prompts, sealed.

    Raises:
        StorageError: if the disk refuses.
    """
    files.write_sealed_json(path, {"format": files.FORMAT, **asdict(golden)})


def read_golden(path: Path) -> Golden:
    """Read them.

    Raises:
        ConfigError: if there are none.
        ModelError: if the file was changed.
    """
    try:
        values = files.read_sealed_json(path)
        return _golden(values)
    except FileNotFoundError as error:
        raise ConfigError(
            "the run has no golden prompts",
            where=str(path),
            fix=f"loratune evaluate run={path.parent} golden={path}",
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = f"the golden prompts are unreadable: {error}"
        raise ModelError(cause, where=str(path), fix="make them again with evaluate") from error


def _golden(values: Mapping[str, Any]) -> Golden:
    prompts: Sequence[Mapping[str, Any]] = values["prompts"]
    return Golden(
        list(values["strengths"]),
        int(values["max_new_tokens"]),
        bool(values["chat"]),
        [GoldenPrompt(**prompt) for prompt in prompts],
    )
