"""What became of the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from loratune.data.cached_rows import row_lengths
from loratune.data.encoded_rows import EncodedRow, EncodedRows, length_to_keep
from loratune.data.not_supervised import unsupervised_turns
from loratune.data.rows import LeftOut


@dataclass(frozen=True)
class SplitReport:
    """One side, training or evaluation.

    Attributes:
        rows: rows read.
        kept: rows used.
        dropped: reason (``empty``, ``overlong``, ``no_target``, ``masked``) to rows left out for
            it.
        truncated: rows used without their end.
        lost_target_tokens: supervised tokens that truncation cut off.
        tokens: tokens of the rows used.
        supervised_tokens: those of them with loss.
        longest: tokens of the longest row as it was, before truncation (a lower bound for a text
            so long that only its beginning was tokenized).
        max_length_to_keep: share of rows (``95%``, ``99%``, ``100%``) to the ``data.max_length``
            that keeps them whole.
        empty: what is empty in the rows dropped as such, to how many.
        first_empty: ``file:line`` of the first of them.
        first_masked: likewise of those whose every turn is masked.
        masked_by: why the turns of that row are, one for each.
    """

    rows: int
    kept: int
    dropped: dict[str, int]
    truncated: int
    lost_target_tokens: int
    tokens: int
    supervised_tokens: int
    longest: int
    max_length_to_keep: dict[str, int]
    empty: dict[str, int] = field(default_factory=dict)
    first_empty: str = ""
    first_masked: str = ""
    masked_by: tuple[str, ...] = ()

    @classmethod
    def of(cls, encoded: EncodedRows, *, rows: int, left_out: Sequence[LeftOut]) -> SplitReport:
        """Count ``encoded``; ``rows`` were read, those ``left_out`` among them."""
        dropped = {"empty": len(left_out), **encoded.dropped}
        masked = encoded.first_masked
        shares = (0.95, 0.99, 1.0) if encoded.lengths else ()
        return cls(
            rows=rows,
            kept=len(encoded.rows),
            dropped={reason: count for reason, count in sorted(dropped.items()) if count},
            truncated=encoded.truncated,
            lost_target_tokens=encoded.lost_target_tokens,
            tokens=int(sum(row_lengths(encoded.rows))),
            supervised_tokens=sum(row.supervised for row in encoded.rows),
            longest=max(encoded.lengths, default=0),
            max_length_to_keep={f"{s:.0%}": length_to_keep(encoded.lengths, s) for s in shares},
            empty=dict(Counter(row.why for row in left_out)),
            first_empty=left_out[0].source if left_out else "",
            first_masked=masked.source if masked else "",
            masked_by=masked.unsupervised if masked else (),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> SplitReport | None:
        """The report whose fields these are."""
        return (
            None if values is None else cls(**{**values, "masked_by": tuple(values["masked_by"])})
        )


@dataclass(frozen=True)
class SourceReport:
    """One source of a mixture.

    Attributes:
        name: of the source.
        path: where its rows lie.
        weight: as the recipe has it.
        drawn: rows drawn from it in an epoch.
        epoch: rows drawn from all sources in an epoch.
        train: its training rows.
        eval: those split off, if any were.
    """

    name: str
    path: str
    weight: float
    drawn: int
    epoch: int
    train: SplitReport
    eval: SplitReport | None

    @property
    def share(self) -> float:
        """Share of the rows trained on that come from here."""
        return self.drawn / self.epoch

    @property
    def passes(self) -> float:
        """How often an epoch sees each of its rows, on average."""
        return self.drawn / self.train.kept

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {**asdict(self), "share": self.share, "passes": self.passes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SourceReport:
        """The report that ``to_dict`` wrote."""
        own = {key: value for key, value in values.items() if key not in ("share", "passes")}
        sides = {side: SplitReport.from_dict(values[side]) for side in ("train", "eval")}
        return cls(**{**own, **sides})

    @property
    def line(self) -> str:
        """For people."""
        counts = _line(self.train)
        held_out = f"; held out: {self.eval.kept:,}" if self.eval else ""
        return (
            f"source {self.name}: {counts}{held_out}; weight {self.weight:g} = {self.share:.1%} "
            f"of the rows drawn, each row {self.passes:.2f} times an epoch"
        )


@dataclass(frozen=True)
class DataReport:
    """Both sides.

    Attributes:
        train: the training rows, if any were asked for.
        eval: the evaluation rows, if any.
        overlap: evaluation rows that are training rows too.
        warnings: what the user should hear about, one sentence each.
        notes: what became of the columns: those not used, numbers taken as text, the choice
            between several formats; and of turns that are not used, or not whole.
        sources: of a mixture.
    """

    train: SplitReport | None
    eval: SplitReport | None
    overlap: int = 0
    warnings: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    sources: tuple[SourceReport, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        values = {**asdict(self), "warnings": list(self.warnings), "notes": list(self.notes)}
        return {**values, "sources": [source.to_dict() for source in self.sources]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataReport:
        """The report that ``to_dict`` wrote."""
        return cls(
            SplitReport.from_dict(values["train"]),
            SplitReport.from_dict(values["eval"]),
            values["overlap"],
            tuple(values["warnings"]),
            tuple(values["notes"]),
            tuple(SourceReport.from_dict(source) for source in values["sources"]),
        )

    def lines(self) -> list[str]:
        """One line a side, a source and a note, for people; warnings are not among them."""
        sides = [("train", self.train), ("eval", self.eval)]
        counts = [f"{name}: {_line(side)}" for name, side in sides if side is not None]
        sources = [source.line for source in self.sources]
        return [*counts, *sources, *(f"note: {note}" for note in self.notes)]


def turn_notes(*parts: Sequence[EncodedRow]) -> tuple[str, ...]:
    """What of the conversations in some rows is not used or not learnt, one sentence each."""
    every = sum(map(len, parts))
    rows, turns, first = Counter[str](), Counter[str](), dict[str, str]()
    unsupervised, keys = Counter[str](), Counter[str]()
    for row in chain(*parts):
        unsupervised.update(row.unsupervised)
        keys.update(row.unused_keys)
        counts = {
            "unanswered": row.unanswered,
            "unsupervised": len(row.unsupervised),
            "dropped": row.dropped_reasoning,
        }
        for what, count in counts.items():
            if count:
                rows[what] += 1
                turns[what] += count
                first.setdefault(what, row.source)
    notes = []
    if rows["unanswered"]:
        notes.append(
            f"turns not used: {turns['unanswered']:,} in {rows['unanswered']:,} of {every:,} rows "
            f"stand behind the assistant's last turn, where nothing is learnt "
            f"({first['unanswered']})"
        )
    if rows["unsupervised"]:
        unlearnt = unsupervised_turns(unsupervised)
        notes.append(
            f"{unlearnt}, in {rows['unsupervised']:,} of {every:,} rows ({first['unsupervised']})"
        )
    if rows["dropped"]:
        plural = "s" if turns["dropped"] > 1 else ""
        notes.append(
            f"reasoning removed (data.reasoning=drop) from {turns['dropped']:,} turn{plural}"
            f" in {rows['dropped']:,} of {every:,} rows ({first['dropped']})"
        )
    if keys:
        named = ", ".join(
            f"{key} ({count:,} row{'s' if count > 1 else ''})" for key, count in keys.items()
        )
        notes.append(f"keys of turns that the chat template does not use: {named}")
    return tuple(notes)


def _line(side: SplitReport) -> str:
    parts = [f"{side.kept:,} of {side.rows:,} rows", f"{side.tokens:,} tokens"]
    parts += [f"{side.supervised_tokens:,} supervised", f"longest {side.longest:,}"]
    if side.dropped:
        counts = " ".join(f"{reason}={count}" for reason, count in side.dropped.items())
        parts.append(f"dropped: {counts}")
    if side.truncated:
        lost = f"{side.lost_target_tokens:,} target tokens lost"
        parts.append(f"truncated: {side.truncated:,} ({lost})")
    return ", ".join(parts)


def warnings_of(
    train: SplitReport | None, eval_: SplitReport | None, overlap: int, max_length: int
) -> tuple[str, ...]:
    """What in these counts deserves a warning."""
    found = [_cut_warning(name, side, max_length) for name, side in
             (("training", train), ("evaluation", eval_)) if side is not None]  # fmt: skip
    if overlap:
        found.append(f"overlap={overlap}: {overlap} evaluation rows are training rows too")
    return tuple(text for text in found if text)


def _cut_warning(name: str, side: SplitReport, max_length: int) -> str:
    losses: Sequence[str] = [
        text
        for count, text in [
            (side.truncated, f"{side.truncated} truncated"),
            (side.dropped.get("no_target", 0), f"no_target={side.dropped.get('no_target')}"),
            (side.dropped.get("overlong", 0), f"overlong={side.dropped.get('overlong')}"),
        ]
        if count
    ]
    if not losses:
        return ""
    keep = ", ".join(f"{length} keeps {share}" for share, length in side.max_length_to_keep.items())
    return f"{name} rows beyond data.max_length={max_length}: {', '.join(losses)}; {keep}"
