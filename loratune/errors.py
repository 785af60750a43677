"""Everything a user can be told, and the exit code that goes with it.

    LoratuneError
    ├── ConfigError         2   a recipe, an override, a flag
    ├── DataError           3   rows, columns, labels
    ├── ModelError          4   base model, adapter, tokenizer
    ├── TrainingError       5   divergence, no gradient, nothing trains
    ├── CheckpointError     6   a checkpoint that does not verify, or drift on resume
    ├── MergeError          7   a merge or export that does not prove itself
    ├── StorageError        8   disk full, unwritable, out of quota
    ├── SecurityError       9   input that tried to be more than data
    ├── BusyError          10   the run folder belongs to another run
    ├── GateError          11   a run that does not pass its gate
    ├── Preempted          75   SIGTERM: saved, resumable
    └── Interrupted       130   SIGINT: saved, resumable

Exit code 1 is reserved for bugs.  Only ``loratune.cli`` prints an error or exits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence


class LoratuneError(Exception):
    """A problem stated for the person who can fix it.

    Args:
        cause: what is wrong, one sentence, no full stop.
        where: the place: ``file:line``, key, tensor, step.
        fix: what to do about it.
    """

    exit_code = 1

    def __init__(self, cause: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.where = where
        self.fix = fix

    def lines(self) -> list[str]:
        """One line per problem, each ``error[CODE] cause; where; fix``, free of line breaks."""
        parts = [part for part in (self.cause, self.where, self.fix) if part]
        text = "; ".join(" ".join(part.split()) for part in parts)
        return [f"error[{self.exit_code}] {text}"]

    def as_dict(self) -> dict[str, object]:
        """The same fields for machines."""
        places = {"where": self.where, "fix": self.fix}
        return {"code": self.exit_code, "cause": self.cause, **places}

    def __str__(self) -> str:
        return "\n".join(self.lines())


class ConfigError(LoratuneError):
    """A recipe, an override or a flag is wrong."""

    exit_code = 2


class DataError(LoratuneError):
    """Rows, columns or labels are unusable."""

    exit_code = 3


class ModelError(LoratuneError):
    """The base model, the adapter or the tokenizer is unusable."""

    exit_code = 4


class TrainingError(LoratuneError):
    """Training diverged, trains nothing, or ran out of memory."""

    exit_code = 5


class CheckpointError(LoratuneError):
    """A checkpoint does not verify, or a resume differs from what was saved."""

    exit_code = 6


class MergeError(LoratuneError):
    """A merge or an export does not prove itself."""

    exit_code = 7


class StorageError(LoratuneError):
    """The disk refused."""

    exit_code = 8


class SecurityError(LoratuneError):
    """Input tried to be more than data."""

    exit_code = 9


class BusyError(LoratuneError):
    """The run folder belongs to another run."""

    exit_code = 10


class GateError(LoratuneError):
    """A run is sound, and not what its gate demands."""

    exit_code = 11


class Preempted(LoratuneError):
    """SIGTERM arrived; the state was saved and can be resumed."""

    exit_code = 75


class Interrupted(LoratuneError):
    """SIGINT arrived; the state was saved and can be resumed."""

    exit_code = 130


class SeveralErrors(LoratuneError):
    """Several problems of one input, reported in one go under the gravest one's exit code."""

    def __init__(self, errors: Sequence[LoratuneError]) -> None:
        gravest = max(errors, key=lambda error: error.exit_code)
        super().__init__(gravest.cause, where=gravest.where, fix=gravest.fix)
        self.errors = list(errors)
        self.exit_code = gravest.exit_code

    def lines(self) -> list[str]:
        ordered = sorted(self.errors, key=lambda error: error.exit_code)  # the gravest last
        return [line for error in ordered for line in error.lines()]

    def __reduce__(self) -> tuple[type, tuple[list[LoratuneError]]]:
        """Errors cross process borders (sweeps in processes of their own)."""
        return type(self), (self.errors,)


def raise_together(errors: Iterable[LoratuneError]) -> None:
    """Raise nothing, the one error, or all of them at once.

    Raises:
        LoratuneError: when ``errors`` is not empty.
    """
    problems = list(errors)
    if problems:
        raise problems[0] if len(problems) == 1 else SeveralErrors(problems)


@contextlib.contextmanager
def refused_as(kind: type[LoratuneError]) -> Iterator[None]:
    """Raise the block's ``ModelError`` as ``kind``: the same lines under another exit code."""
    try:
        yield
    except ModelError as error:
        raise kind(error.cause, where=error.where, fix=error.fix) from error
    except SeveralErrors as error:
        if not all(isinstance(part, ModelError) for part in error.errors):
            raise
        parts = [kind(part.cause, where=part.where, fix=part.fix) for part in error.errors]
        raise SeveralErrors(parts) from error


def unknown_setting(
    key: str, choices: Iterable[str], *, where: str = "", hint: str = ""
) -> ConfigError:
    """The error for a ``key`` that is not a setting.

    Args:
        key: as it was typed, with dots.
        choices: the settings that there are at that place.
        where: file and line; the key itself if left out.
        hint: what to say if no choice is spelt like it.
    """
    names = sorted(choices)
    advice = did_you_mean(key.rsplit(".", 1)[-1], names) or hint
    listing = f"available: {', '.join(names) or 'none'}" if names or not hint else ""
    fix = f"{advice} {listing}".strip()
    return ConfigError(f"'{key}' is not a setting", where=where or key, fix=fix)


def choose_one(word: str, choices: Iterable[str]) -> str:
    """``did you mean 'rank'?``, or every choice there is."""
    names = list(choices)
    return did_you_mean(word, names) or f"choose one of {', '.join(names)}"


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``did you mean 'rank'?`` or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.55)
    return f"did you mean '{close[0]}'?" if close else ""
