"""What is likely to be wrong with rows that can be trained on: found before a step is spent.

An error would make every step teach the wrong thing, and stops a run; a warning is for a person
to judge; a note is only worth knowing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest

from loratune.config.schema import DataConfig, RowFormat, SpecialTokens
from loratune.data.cached_rows import row_lengths
from loratune.data.encoded_rows import EncodedRow
from loratune.data.findings import Audit, Finding, Severity, gravest_first
from loratune.data.not_supervised import all_masked, unmask
from loratune.data.prepare import PreparedData
from loratune.data.report import SplitReport
from loratune.data.rows import left_out_words
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import SPACE_MARKS, RowTokenizer, Tokenizer

LONGEST_SHOWN = 3
SPELLINGS_SHOWN = 3
SAMPLED = 500
"""Rows whose texts are looked at, where looking at every row would take long."""


def audit(data: PreparedData, tokenizer: Tokenizer, config: DataConfig) -> Audit:
    """Look for rows that teach nothing, twice, too much, or the wrong beginning and end.

    Args:
        data: the prepared rows; a side may be empty.
        tokenizer: the base model's.
        config: how the rows were prepared.
    """
    rows = RowTokenizer(tokenizer)
    found = [
        *(finding for part in _parts(data) for finding in _of_part(part, rows, config)),
        *_cut("evaluation", _sourceless(data), config.max_length),
        *_repeated(data.train),
        *_shared(data),
    ]
    lengths = row_lengths(data.train)
    places = nlargest(LONGEST_SHOWN, range(len(lengths)), key=lengths.__getitem__)
    longest = (data.train[place] for place in places)
    return Audit(gravest_first(found), tuple((row.source, len(row)) for row in longest))


@dataclass(frozen=True)
class _Part:
    """Rows of one format: all of them, or a source of a mixture."""

    name: str
    format: PromptFormat
    train: Sequence[EncodedRow]
    train_report: SplitReport | None
    eval_report: SplitReport | None


def _parts(data: PreparedData) -> list[_Part]:
    if not data.report.sources:
        return [_Part("", data.prompt_format, data.train, data.report.train, data.report.eval)]
    return [
        _Part(
            source.name,
            data.source_formats[source.name],
            [row for row in data.train if row.origin == source.name],
            source.train,
            source.eval,
        )
        for source in data.report.sources
    ]


def _sourceless(data: PreparedData) -> SplitReport | None:
    """The evaluation rows of a mixture that come from ``data.eval_path``."""
    sources = data.report.sources
    return data.report.eval if sources and not any(one.eval for one in sources) else None


def _of_part(part: _Part, rows: RowTokenizer, config: DataConfig) -> Iterator[Finding]:
    """What is found in the rows of one part, under its name."""
    found = [
        *_unsupervised(part.train_report),
        *_masked(part.train_report),
        *_doubled_start(part.train, rows),
        *_endings(part.train, rows, config.max_length),
        *_cut("training", part.train_report, config.max_length),
        *_cut("evaluation", part.eval_report, config.max_length),
        *_glued(part.train, rows.tokenizer),
        *_chat(part, rows.tokenizer),
        *_spelt(part.train, config.special_tokens_in_text),
        *_left_out(part.train),
        *_empty(part.train_report),
    ]
    for finding in found:
        named = f"source {part.name}: {finding.message}" if part.name else finding.message
        yield replace(finding, message=named)


def _unsupervised(report: SplitReport | None) -> Iterator[Finding]:
    lost = report.dropped.get("no_target", 0) if report else 0
    if report and lost:
        severity = Severity.error if lost > report.kept else Severity.warning
        yield Finding(
            severity,
            "no_labels",
            f"{lost:,} of {report.rows:,} rows have no supervised token left: the prompt alone "
            "fills data.max_length",
            "data.max_length",
            f"raise it: {_curve(report)}",
            lost,
        )


def _masked(report: SplitReport | None) -> Iterator[Finding]:
    lost = report.dropped.get("masked", 0) if report else 0
    if report and lost:
        severity = Severity.error if lost > report.kept else Severity.warning
        cause = all_masked(lost, report.rows, report.masked_by)
        yield Finding(
            severity, "masked", cause, report.first_masked, unmask(report.masked_by), lost
        )


def _cut(name: str, report: SplitReport | None, max_length: int) -> Iterator[Finding]:
    if report and report.truncated:
        yield Finding(
            Severity.warning,
            "truncated",
            f"{report.truncated:,} of {report.rows:,} {name} rows lose their end at {max_length} "
            f"tokens, {report.lost_target_tokens:,} supervised tokens with it, the end token too",
            "data.max_length",
            f"raise it: {_curve(report)}",
            report.truncated,
        )


def _curve(report: SplitReport) -> str:
    return ", ".join(f"{n} keeps {share}" for share, n in report.max_length_to_keep.items())


def _doubled_start(rows: Sequence[EncodedRow], tokenizer: RowTokenizer) -> Iterator[Finding]:
    start = tokenizer.start_ids
    twice = _Counted()
    for row in rows if start else ():
        if row.input_ids[: 2 * len(start)] == start * 2:
            twice.add(row)
    if twice.first:
        severity = Severity.error if 2 * twice.rows > len(rows) else Severity.warning
        yield Finding(
            severity,
            "doubled_start",
            f"{twice.rows:,} of {len(rows):,} rows begin with the start token twice",
            twice.first.source,
            "remove it from the text or the chat template: it is added to every row",
            twice.rows,
        )


def _endings(
    rows: Sequence[EncodedRow], tokenizer: RowTokenizer, max_length: int
) -> Iterator[Finding]:
    """Rows whose last supervised part does not end as generation stops.

    Those that may have been cut do not count.
    """
    special = {tokenizer.end_id, *tokenizer.special_ids()}
    whole, masked, template, others = _Counted(), _Counted(), _Counted(), _Counted()
    because = dict[str, None]()
    for row in rows:
        if len(row) >= max_length:
            continue
        whole.add(row)
        if _last_learnt(row) != tokenizer.end_id:
            others.add(row)
        if _last_learnt(row) in special:
            continue
        if _answer_masked(row) and row.input_ids[-1] in special:
            masked.add(row)
            because.update(dict.fromkeys(row.unsupervised))
        else:
            template.add(row)
    if masked.first or template.first:
        severity = (
            Severity.error if 2 * (masked.rows + template.rows) > whole.rows else Severity.warning
        )
        why = f": the turn that ends them is not supervised ({', '.join(because)})"
        close = "close the assistant's turn with the end token in the chat template"
        for concerned, reason in ((masked, why), (template, "")):
            if concerned.first:
                yield Finding(
                    severity,
                    "no_end",
                    f"{concerned.rows:,} of {whole.rows:,} rows do not teach the model to stop"
                    f"{reason}",
                    concerned.first.source,
                    unmask(concerned.first.unsupervised) if reason else close,
                    concerned.rows,
                )
    elif others.first:
        yield _other_end(others.first, others.rows, tokenizer)


def _other_end(row: EncodedRow, rows: int, tokenizer: RowTokenizer) -> Finding:
    [token] = tokenizer.tokenizer.convert_ids_to_tokens([_last_learnt(row)])
    [end] = tokenizer.tokenizer.convert_ids_to_tokens([tokenizer.end_id])
    return Finding(
        Severity.warning,
        "other_end",
        f"{rows:,} rows end with {token!r}, and the tokenizer's eos_token is {end!r}",
        row.source,
        "we stop at both; for other programs make the template's closing token the eos_token",
        rows,
    )


def _last_learnt(row: EncodedRow) -> int:
    """The last token with loss."""
    return row.input_ids[row.spans[-1][1] - 1]


def _answer_masked(row: EncodedRow) -> bool:
    """Whether nothing is learnt of the last answer."""
    return bool(row.unsupervised) and row.spans[-1][1] <= row.prompt_length


def _glued(rows: Sequence[EncodedRow], tokenizer: Tokenizer) -> Iterator[Finding]:
    """Answers that begin without a space or a line after the prompt."""
    sample = [row for row in rows[:SAMPLED] if row.prompt_length > 1]
    glued = [row for row in sample if _letters_meet(row, tokenizer)]
    if 2 * len(glued) > len(sample):
        yield Finding(
            Severity.note,
            "glued",
            f"{len(glued):,} of the first {len(sample):,} prompts end in a letter that the answer "
            "follows without a space",
            glued[0].source,
            "end the prompt with a separator, for example data.template='{prompt}\\nAnswer: '",
            len(glued),
        )


def _letters_meet(row: EncodedRow, tokenizer: Tokenizer) -> bool:
    last, first = row.input_ids[row.prompt_length - 1 : row.prompt_length + 1]
    [written] = tokenizer.convert_ids_to_tokens([first])  # decoding may drop a leading space
    before, after = tokenizer.decode([last]), tokenizer.decode([first])
    spaced = written.startswith(SPACE_MARKS)
    return before[-1:].isalnum() and after[:1].isalnum() and not spaced


def _chat(part: _Part, tokenizer: Tokenizer) -> Iterator[Finding]:
    plain = part.format.format in (RowFormat.prompt, RowFormat.instruction)
    if plain and tokenizer.chat_template:
        yield Finding(
            Severity.warning,
            "chat_template_unused",
            "the tokenizer has a chat template, and these rows are not conversations: the model "
            "will not see the turn markers it was trained with",
            "data.format",
            "use rows with `messages`, or a base model that was not tuned for chat",
            len(part.train),
        )


def _spelt(rows: Sequence[EncodedRow], setting: SpecialTokens) -> Iterator[Finding]:
    """Words that spell special tokens: what a model takes for an end may be talk about one."""
    spelling, spelt = _Counted(), dict[str, None]()
    for row in rows:
        if row.spelt:
            spelling.add(row)
            spelt.update(dict.fromkeys(row.spelt))
    if spelling.first:
        parsed = setting is SpecialTokens.parse
        usual = 2 * spelling.rows >= len(rows)
        tokens = list(spelt)
        shown = ", ".join(map(repr, tokens[:SPELLINGS_SHOWN]))
        more = f" and {len(tokens) - SPELLINGS_SHOWN} more" if tokens[SPELLINGS_SHOWN:] else ""
        became = "become these tokens" if parsed else "are encoded as plain text"
        other = "text" if parsed else "parse"
        yield Finding(
            Severity.warning if parsed or usual else Severity.note,
            "special_tokens",
            f"the words of {spelling.rows:,} of {len(rows):,} rows spell special tokens ({shown}"
            f"{more}); they {became}",
            spelling.first.source,
            f"set data.special_tokens_in_text={other} if they are not to, or error to refuse them",
            spelling.rows,
        )


def _left_out(rows: Sequence[EncodedRow]) -> Iterator[Finding]:
    concerned, turns = _Counted(), 0
    for row in rows:
        if row.left_out:
            concerned.add(row)
            turns += row.left_out
    if concerned.first:
        yield Finding(
            Severity.note,
            "reasoning_left_out",
            f"the chat template leaves out the reasoning of {turns:,} turns in {concerned.rows:,} "
            f"of {len(rows):,} rows: the model neither sees nor learns it",
            concerned.first.source,
            "most templates show only the last turn's; split the rows to learn from every turn",
            concerned.rows,
        )


def _repeated(rows: Sequence[EncodedRow]) -> Iterator[Finding]:
    copies, seen = _Counted(), set[int]()
    for row in rows:
        key = _key(row.input_ids)
        if key in seen:
            copies.add(row)
        seen.add(key)
    if copies.first:
        severity = Severity.warning if 100 * copies.rows >= len(rows) else Severity.note
        yield Finding(
            severity,
            "duplicates",
            f"{copies.rows:,} of {len(rows):,} training rows repeat an earlier row",
            copies.first.source,
            "remove them: repeated rows are learnt by heart",
            copies.rows,
        )


def _shared(data: PreparedData) -> Iterator[Finding]:
    if data.report.overlap:
        yield Finding(
            Severity.warning,
            "overlap",
            f"{data.report.overlap:,} of {len(data.eval):,} evaluation rows are training rows too: "
            "their scores say nothing about new rows",
            "data.eval_path",
            "evaluate on other rows",
            data.report.overlap,
        )
    asked = {_prompt_key(row) for row in data.eval if row.prompt_length > 1}
    trained = {key for row in data.train if asked and (key := _prompt_key(row)) in asked}
    known = [row for row in data.eval if row.prompt_length > 1 and _prompt_key(row) in trained]
    if len(known) > data.report.overlap:
        yield Finding(
            Severity.warning,
            "shared_prompts",
            f"{len(known):,} of {len(data.eval):,} evaluation rows have a prompt trained on",
            known[0].source,
            "split by prompt (data.split_by=prompt), or evaluate on other prompts",
            len(known),
        )


def _empty(report: SplitReport | None) -> Iterator[Finding]:
    if report and report.empty:
        rows = sum(report.empty.values())
        message = f"{rows:,} of {report.rows:,} rows are {left_out_words(report.empty)}"
        yield Finding(Severity.note, "empty", message, report.first_empty, rows=rows)


@dataclass
class _Counted:
    """Rows of one kind: how many, and the first of them; the others are not held."""

    rows: int = 0
    first: EncodedRow | None = None

    def add(self, row: EncodedRow) -> None:
        self.rows += 1
        self.first = self.first or row


def _prompt_key(row: EncodedRow) -> int:
    return _key(row.input_ids[: row.prompt_length])


def _key(ids: Sequence[int]) -> int:
    # A 64-bit hash in place of the ids: a million rows fit, and two of them hardly ever meet.
    return hash(tuple(ids))
