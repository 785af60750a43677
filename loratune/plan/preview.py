"""The first rows as the model sees them, and what is wrong with all of them.

Reads the rows and the tokenizer; no weight of any model.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from rich.text import Text

from loratune.config.schema import RunConfig
from loratune.console import console, escaped, printable, say
from loratune.data.arrangement import assumed_arrangement, sharing_line
from loratune.data.bounds import position_findings
from loratune.data.cache import prepare_and_audit
from loratune.data.encoded_rows import EncodedRow
from loratune.data.findings import Audit, Finding, Severity
from loratune.data.mixture import seen_line
from loratune.data.not_supervised import unsupervised_turns
from loratune.data.prepare import PreparedData
from loratune.data.report import DataReport
from loratune.data.tokenizing import RowTokenizer
from loratune.data.training_set import TrainingSet
from loratune.errors import LoratuneError, ModelError
from loratune.models.build import meta_model, read_transformers_config
from loratune.models.measure import find_architecture
from loratune.models.source import model_folder
from loratune.models.vocabulary import tokenizer_and_rows
from loratune.plan.notices import match_targets

# Neighbouring tokens alternate between two shades, so that their borders show.
_STYLES = {
    "supervised": ("bold green", "bold bright_green"),
    "context": ("default", "bright_black"),
    "start": ("magenta", "magenta"),
    "end": ("bold reverse green", "bold reverse green"),
    "padding": ("dim strike", "dim strike"),
}
_PIECE = "\ufffd"
"""What stands for bytes that are not a whole character."""
_MOST_PIECES = 8
_MARKS = "⟦⟧⟪⟫⟨⟩·↵⇥␍"
"""What this page is written with, and a row's own text is therefore not."""
_VISIBLE = str.maketrans(
    {mark: escaped(mark) for mark in _MARKS} | {"\\": "\\\\", " ": "·", "\t": "⇥", "\r": "␍"}
)
_LEGEND = (
    "⟦ ⟧ supervised (green), context plain, ⟪ ⟫ start token, ⟨ ⟩ text that spells a special token\n"
    "· space, ↵ line break, ⇥ tab, \\\\ backslash, \\u27e6 a character by its number: one that is "
    "invisible, or one of these marks in the row's text"
)


@dataclass(frozen=True)
class ShownToken:
    """One token of a row.

    Attributes:
        text: as decoded, white space and control characters as they are; a character of several
            tokens belongs to the first of them.
        kind: supervised, context, start, end (a supervised end token) or padding.
        spelt_text: whether it is part of a text that spells a special token.
    """

    id: int
    text: str
    kind: str
    spelt_text: bool = False


@dataclass(frozen=True)
class ShownRow:
    """One training row, filled up as if the rows shown were one batch.

    Attributes:
        ends: the last token of every supervised stretch.
        left_out: turns whose reasoning the chat template leaves out.
        spelt: special tokens that the row's words spell.
        origin: name of its source in a mixture.
        unanswered: turns behind the assistant's last, which are not used.
        unused_keys: keys of turns that the chat template does not use.
        unsupervised: why, one for each assistant turn without loss.
        dropped_reasoning: turns whose reasoning was removed.
        spelt_as_text: whether ``spelt`` are text, and not the tokens.
    """

    source: str
    tokens: tuple[ShownToken, ...]
    ends: tuple[str, ...] = ()
    left_out: int = 0
    spelt: tuple[str, ...] = ()
    origin: str = ""
    unanswered: int = 0
    unused_keys: tuple[str, ...] = ()
    unsupervised: tuple[str, ...] = ()
    dropped_reasoning: int = 0
    spelt_as_text: bool = False

    def count(self, *kinds: str) -> int:
        """Tokens of these kinds."""
        return sum(token.kind in kinds for token in self.tokens)


@dataclass(frozen=True)
class Preview:
    """What ``preview`` shows.

    Attributes:
        max_length: ``data.max_length``.
        sharing: what batches save, in words.
        times_seen: mixtures only: how often the run sees a row of each source, on average.
    """

    rows: tuple[ShownRow, ...]
    report: DataReport
    audit: Audit
    max_length: int
    sharing: str = ""
    times_seen: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "data": self.report.to_dict(),
            "times_seen": dict(self.times_seen),
            "audit": self.audit.to_dict(),
            "notes": list(self.notes),
        }


BATCHES_LOOKED_AT = 50
"""Batches whose rows are searched for common beginnings."""


def make_preview(config: RunConfig, rows: int) -> Preview:
    """Prepare the recipe's data as training would and look at it.

    Args:
        config: the recipe.
        rows: how many training rows to show, of each source.

    Raises:
        LoratuneError: rows or a tokenizer that cannot be used at all.
    """
    read = read_prepared(config)
    data, tokenizer = read.data, read.tokenizer
    first = _first_rows(data, rows)
    width = max(map(len, first), default=0)
    return Preview(
        tuple(_shown(row, tokenizer, data.pad_id, width) for row in first),
        data.report,
        read.audit,
        config.data.max_length,
        _sharing(config, data),
        _times_seen(config, data),
        _target_notes(config),
    )


def _first_rows(data: PreparedData, rows: int) -> list[EncodedRow]:
    """The first training rows, of a mixture those of each source."""
    names = list(data.weights) or [""]
    own = ([row for row in data.train if row.origin == name] for name in names)
    return [row for part in own for row in part[:rows]]


def _times_seen(config: RunConfig, data: PreparedData) -> dict[str, float]:
    if not data.weights or not (config.trainer.steps or config.trainer.epochs):
        return {}
    arrangement = assumed_arrangement(config)
    drawn = TrainingSet.from_config(data.train, arrangement, config.data, config.trainer)
    return drawn.plan.times_seen()


def _sharing(config: RunConfig, data: PreparedData) -> str:
    """What the first batches save by sharing what their rows begin with, in words."""
    trainer = replace(config.trainer, steps=BATCHES_LOOKED_AT, epochs=None, grad_accum_steps=1)
    arrangement, counts = assumed_arrangement(config), Counter[str]()
    plan = TrainingSet.from_config(data.train, arrangement, config.data, trainer).plan
    for step in range(min(BATCHES_LOOKED_AT, plan.steps_per_epoch)):
        rows = [data.train[number] for number in plan.step_rows(step)]
        counts["row_tokens"] += sum(map(len, rows))
        counts["computed"] += math.prod(arrangement.shape(rows))
    return sharing_line(**counts) if counts["row_tokens"] > counts["computed"] else ""


class ReadRows(NamedTuple):
    """The recipe's rows as training gets them.

    Attributes:
        data: the rows.
        tokenizer: the base model's.
        findings: how the rows fit the model; none where it cannot be built, which training says.
        audit: these, and what is likely to be wrong with the rows themselves.
    """

    data: PreparedData
    tokenizer: Any
    findings: tuple[Finding, ...]
    audit: Audit


def read_prepared(config: RunConfig) -> ReadRows:
    """The recipe's rows as training gets them, with the tokenizer.

    Raises:
        LoratuneError: rows or a tokenizer that cannot be used at all.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = model_folder(config.model.path, config.model.revision, weights=False)
    tokenizer, vocabulary = tokenizer_and_rows(folder, config.model.add_tokens)
    checked = prepare_and_audit(config.data, tokenizer, vocabulary, config.trainer.seed)
    data = checked.data
    try:
        model = meta_model(read_transformers_config(folder), str(folder))
    except ModelError:
        return ReadRows(data, tokenizer, (), checked.audit)
    findings = tuple(position_findings(model, data.train, data.eval))
    return ReadRows(data, tokenizer, findings, checked.audit.with_further(findings))


def _target_notes(config: RunConfig) -> tuple[str, ...]:
    """What training would say of the targets; what it would refuse is not the rows' affair."""
    notices: tuple[str, ...] = ()
    with suppress(LoratuneError):
        notices = match_targets(config, find_architecture(config.model)).notices
    return (*notices, *config.adapter.warnings())


def _shown(row: EncodedRow, tokenizer: Any, pad_id: int, width: int) -> ShownRow:
    rows = RowTokenizer(tokenizer)
    supervised = {place for start, end in row.spans for place in range(start, end)}
    last = {end - 1 for _, end in row.spans}
    spelt = {place for start, end in row.spelt_text for place in range(start, end)}
    special = rows.special_ids()
    starts = len(rows.start_ids) if row.input_ids[: len(rows.start_ids)] == rows.start_ids else 0
    texts = _texts(row.input_ids, tokenizer)
    tokens = []
    for place, token in enumerate(row.input_ids):
        kind = "supervised" if place in supervised else "start" if place < starts else "context"
        if kind == "supervised" and (token == rows.end_id or (place in last and token in special)):
            kind = "end"
        tokens.append(ShownToken(token, texts[place], kind, place in spelt))
    padding = ShownToken(pad_id, _text(pad_id, tokenizer), "padding")
    ends = tuple(tokens[end - 1].text for _, end in row.spans)
    filled = (*tokens, *[padding] * (width - len(row)))
    return ShownRow(
        row.source,
        filled,
        ends,
        left_out=row.left_out,
        spelt=row.spelt,
        origin=row.origin,
        unanswered=row.unanswered,
        unused_keys=row.unused_keys,
        unsupervised=row.unsupervised,
        dropped_reasoning=row.dropped_reasoning,
        spelt_as_text=bool(row.spelt_text),
    )


def _texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of every token; pieces of one character have it at the first of them."""
    texts: list[str] = []
    while len(texts) < len(ids):
        place = len(texts)
        text = _text(ids[place], tokenizer)
        if _PIECE in text:
            for size in range(2, min(_MOST_PIECES, len(ids) - place) + 1):
                joined = str(tokenizer.decode(ids[place : place + size], skip_special_tokens=False))
                if _PIECE not in joined:
                    texts += [joined, *[""] * (size - 2)]
                    text = ""
                    break
        texts.append(text)
    return texts


def _text(token: int, tokenizer: Any) -> str:
    """A token alone, with a space that the tokenizer leaves unwritten."""
    [raw] = tokenizer.convert_ids_to_tokens([token])
    text = str(tokenizer.decode([token], skip_special_tokens=False))
    return f" {text}" if str(raw).startswith("\u2581") and not text.startswith(" ") else text


def show_preview(preview: Preview) -> None:
    """Print rows and findings."""
    say(_LEGEND)
    for number, row in enumerate(preview.rows, start=1):
        supervised, padding = row.count("supervised", "end"), row.count("padding")
        filled = f", {padding} padding" if padding else ""
        tokens = len(row.tokens) - padding
        place = f"source {row.origin}, {row.source}" if row.origin else row.source
        say(f"\nrow {number}, {place}: {tokens} tokens, {supervised} supervised{filled}")
        say(parts_line(row))
        console().print(row_text(row), soft_wrap=True)
    say()
    for line in audit_lines(preview):
        say(line)


def _visible(text: str) -> str:
    """White space and control characters as something to see."""
    shown = printable(text.translate(_VISIBLE)).replace("\n", "↵\n")
    return "".join(escaped(c) if c.isspace() and c != "\n" else c for c in shown)


def parts_line(row: ShownRow) -> str:
    """How many parts are supervised, how each ends, and what the row says and does not teach."""
    ends = " or ".join(dict.fromkeys(_visible(end) for end in row.ends)) or "nothing"
    parts = (
        "1 supervised part ends" if len(row.ends) == 1 else f"{len(row.ends)} supervised parts end"
    )
    line = f"{parts} in {ends}"
    if row.unsupervised:
        line += f"; {unsupervised_turns(row.unsupervised)}"
    if row.left_out:
        line += f"; the chat template leaves out the reasoning of {_turns(row.left_out)}"
    if row.dropped_reasoning:
        line += f"; reasoning of {_turns(row.dropped_reasoning)} removed"
    if row.spelt:
        became = "text, in ⟨ ⟩" if row.spelt_as_text else "tokens"
        line += f"; words spell {', '.join(map(repr, row.spelt))} (as {became})"
    if row.unanswered:
        line += f"; {_turns(row.unanswered)} behind the assistant's last not used"
    if row.unused_keys:
        line += f"; not used by the chat template: {', '.join(row.unused_keys)}"
    return line


def _turns(count: int) -> str:
    return "1 turn" if count == 1 else f"{count} turns"


def row_text(row: ShownRow) -> Text:
    """A row with every token in the style of its kind, its stretches in brackets.

    Supervised stretches, and within or outside of them texts that spell special tokens.
    """
    text = Text()
    inside = spelling = False
    for number, token in enumerate(row.tokens):
        supervised = token.kind in ("supervised", "end")
        if spelling and (not token.spelt_text or supervised != inside):
            text.append("⟩", "bold")
            spelling = False
        if supervised != inside:
            text.append("⟦" if supervised else "⟧", "bold green")
            inside = supervised
        if token.spelt_text and not spelling:
            text.append("⟨", "bold")
            spelling = True
        if token.kind == "padding":
            text.append(f" [padding × {row.count('padding')}]", "dim")
            break
        visible = _visible(token.text)
        visible = f"⟪{visible}⟫" if token.kind == "start" else visible
        text.append(visible, _STYLES[token.kind][number % 2])
    if spelling:
        text.append("⟩", "bold")
    if inside:
        text.append("⟧", "bold green")
    return text


def audit_lines(preview: Preview) -> Iterator[str]:
    """Counts, the truncation curve, the longest rows, and every finding that is not an error.

    Errors are raised once all of this is printed.
    """
    yield from preview.report.lines()
    if preview.times_seen:
        yield seen_line(preview.times_seen)
    train = preview.report.train
    if train is not None and train.max_length_to_keep:
        pairs = train.max_length_to_keep.items()
        curve = ", ".join(f"{length} keeps {share}" for share, length in pairs)
        yield f"data.max_length={preview.max_length}; to keep rows whole: {curve}"
    longest = ", ".join(f"{source} ({tokens})" for source, tokens in preview.audit.longest)
    yield f"longest rows as trained on: {longest}"
    if preview.sharing:
        yield preview.sharing
    for note in preview.notes:
        yield f"note: {note}"
    for finding in preview.audit.findings:
        if finding.severity is not Severity.error:
            yield finding.line
    if not preview.audit.findings:
        yield "audit: nothing found"
