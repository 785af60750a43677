"""Rows as ids, with what is supervised marked by position."""

from __future__ import annotations

import hashlib
import math
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from loratune.data.not_supervised import all_masked, unmask
from loratune.errors import DataError
from loratune.loss.constants import IGNORED


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row as ids.

    Attributes:
        input_ids: the whole row, start token and end token included.
        spans: supervised positions, ``[start, end)`` each, ascending, none before position 1
            (nothing predicts the first token).
        prompt_length: tokens before the last answer: what generation is given.
        source: ``file:line``.
        spelt: special tokens that the row's words spell.
        left_out: turns whose reasoning the chat template leaves out.
        origin: name of its source in ``data.sources``; empty without sources.
        unanswered: turns behind the assistant's last, of which nothing is encoded.
        unused_keys: keys of turns that the chat template does not write.
        unsupervised: why, one for each assistant turn without loss.
        dropped_reasoning: turns whose reasoning was removed.
        spelt_text: positions that spell special tokens and are text, ``[start, end)`` each;
            truncation leaves them as they are.
    """

    input_ids: list[int]
    spans: tuple[tuple[int, int], ...]
    prompt_length: int
    source: str
    spelt: tuple[str, ...] = ()
    left_out: int = 0
    origin: str = ""
    unanswered: int = 0
    unused_keys: tuple[str, ...] = ()
    unsupervised: tuple[str, ...] = ()
    dropped_reasoning: int = 0
    spelt_text: tuple[tuple[int, int], ...] = ()

    @property
    def labels(self) -> list[int]:
        """``input_ids`` where supervised, else ``IGNORED``; not shifted."""
        labels = [IGNORED] * len(self.input_ids)
        for start, end in self.spans:
            labels[start:end] = self.input_ids[start:end]
        return labels

    @property
    def supervised(self) -> int:
        """Tokens with loss."""
        return sum(end - start for start, end in self.spans)

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class EncodedRows:
    """The rows that can be trained on, and what became of the others.

    Attributes:
        rows: rows with at least one supervised token, in order.
        kept: for each of ``rows`` its position among the examples.
        dropped: reason to count: ``overlong``, ``no_target`` (truncation leaves no supervised
            token), ``masked`` (there is none).
        first_masked: the first row dropped as ``masked``.
        truncated: rows kept without their end.
        lost_target_tokens: supervised tokens that truncation cut off, over all rows.
        lengths: every row's whole length in tokens, before truncation.
    """

    rows: Sequence[EncodedRow] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    first_masked: EncodedRow | None = None
    truncated: int = 0
    lost_target_tokens: int = 0
    lengths: Sequence[int] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Sequence[EncodedRows]) -> EncodedRows:
        """Several as one; ``kept`` then counts through the examples of all of them."""
        whole = cls()
        for part in parts:
            whole.kept += [len(whole.lengths) + place for place in part.kept]
            whole.rows = [*whole.rows, *part.rows]
            whole.dropped += part.dropped
            whole.first_masked = whole.first_masked or part.first_masked
            whole.truncated += part.truncated
            whole.lost_target_tokens += part.lost_target_tokens
            whole.lengths = [*whole.lengths, *part.lengths]
        return whole

    def of_source(self, name: str) -> EncodedRows:
        """The same with rows that say their source."""
        return replace(
            self, rows=[replace(row, origin=name) for row in self.rows] if name else self.rows
        )

    def require_rows(self, max_length: int) -> None:
        """Check that there is something to learn, where there were rows.

        Raises:
            DataError: saying why there is nothing.
        """
        total, masked = len(self.lengths), self.first_masked
        if len(self.rows) or not total:
            return
        if masked is not None and not self.dropped["no_target"]:
            cause = all_masked(self.dropped["masked"], total, masked.unsupervised)
            raise DataError(cause, where=masked.source, fix=unmask(masked.unsupervised))
        keep = ", ".join(
            f"{length_to_keep(self.lengths, share)} keeps {share:.0%}"
            for share in (0.95, 0.99, 1.0)
        )
        lost = sum(self.dropped.values())
        raise DataError(
            f"{lost}/{total} rows have no supervised token within data.max_length={max_length}",
            where="data.max_length",
            fix=f"raise it: {keep} of the rows whole",
        )


def truncate(row: EncodedRow, max_length: int) -> EncodedRow:
    """The row without what lies beyond ``max_length`` tokens; itself if it fits."""
    if len(row) <= max_length:
        return row
    return replace(
        row,
        input_ids=row.input_ids[:max_length],
        spans=learnable(row.spans, 1, max_length),
        prompt_length=min(row.prompt_length, max_length),
    )


def encoded_fingerprint(parts: Sequence[Sequence[EncodedRow]]) -> str:
    """Hex sha256 over the ids, supervised positions and prompts' ends of rows, in order."""
    digest = hashlib.sha256()
    for rows in parts:
        digest.update(f"{len(rows)} rows\n".encode())
        for row in rows:
            digest.update(f"{len(row)} {row.spans} {row.prompt_length}\n".encode())
            ids = array("q", row.input_ids)
            if sys.byteorder == "big":
                ids.byteswap()
            digest.update(ids.tobytes())
    return digest.hexdigest()


def length_to_keep(lengths: Iterable[int], share: float) -> int:
    """The smallest ``max_length`` that keeps this share of rows whole."""
    ordered = sorted(lengths)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def learnable(
    spans: Iterable[tuple[int, int]], first: int, end: int | None = None
) -> tuple[tuple[int, int], ...]:
    """Spans cut to ``[first, end)``, empty ones left out."""
    cut = ((max(a, first), b if end is None else min(b, end)) for a, b in spans)
    return tuple((a, b) for a, b in cut if a < b)
