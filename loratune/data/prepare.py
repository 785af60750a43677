"""From a recipe's ``data`` to rows of ids, in one call."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import chain

from loratune.config.mixture import source_weights
from loratune.config.schema import DataConfig, RowFormat
from loratune.data.cached_rows import RowStore
from loratune.data.chat import chat_template_of
from loratune.data.clock import now, reads_clock
from loratune.data.columns import column_notes
from loratune.data.encode import Encoder
from loratune.data.encoded_rows import EncodedRow, EncodedRows, encoded_fingerprint
from loratune.data.formats import choose_format, parse_rows
from loratune.data.mixture import Mixture
from loratune.data.parts import Part, in_parts, read_parts
from loratune.data.reading import RowsInFiles
from loratune.data.report import DataReport, SourceReport, SplitReport, turn_notes, warnings_of
from loratune.data.rows import Example, LeftOut, Row, data_fingerprint, left_out_words
from loratune.data.split import split_examples
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import RowTokenizer, Tokenizer
from loratune.errors import DataError, LoratuneError

STREAMED_ROWS = 4096
"""Rows that are in memory as text at a time, where a store takes the encoded ones."""


@dataclass(frozen=True)
class GenerationPrompt:
    """A prompt of the evaluation rows, once, with all the answers that rows give to it.

    Attributes:
        prompt_ids: what generation is given, start token included.
        answer: the first row's answer, without white space around it.
        references: every distinct answer, likewise.
        answer_ids: the distinct answers as training saw them, of rows that were not cut short.
        source: ``file:line`` of the first row.
        messages: role and content of the turns that ask; empty where there is more to them, or the
            row is not a conversation.
    """

    prompt_ids: list[int]
    answer: str
    references: tuple[str, ...]
    answer_ids: tuple[tuple[int, ...], ...]
    source: str
    messages: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class PreparedData:
    """Rows ready for training and evaluation.

    Attributes:
        train: training rows; empty if only evaluation rows were asked for.
        eval: evaluation rows; may be empty.
        prompts: one for each distinct prompt of ``eval``; empty for text rows.
        prompt_format: how prompts were written; kept with the adapter.  A mixture's is that of
            its first source.
        report: what became of the rows.
        fingerprints: ``train`` (a mixture: ``sources.NAME`` of each) and ``eval`` to the sha256
            of the rows read, in order.
        encoded: one sha256 of what became of them: ids and supervised positions.
        pad_id: the id to fill batches with.
        source_formats: mixtures only: how the prompts of every source were written.
        weights: mixtures only: name to weight of every source.
    """

    train: Sequence[EncodedRow]
    eval: list[EncodedRow]
    prompts: list[GenerationPrompt]
    prompt_format: PromptFormat
    report: DataReport
    fingerprints: dict[str, str]
    encoded: str
    pad_id: int
    source_formats: Mapping[str, PromptFormat] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """One sha256 for all rows, and for the sources' weights and order."""
        content = repr(sorted(self.fingerprints.items()))
        if self.weights:
            content += repr(list(self.weights.items()))
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def answer_format(self) -> PromptFormat:
        """The format that says where answers stop: of a mixture, one with a chat template."""
        formats = (self.prompt_format, *self.source_formats.values())
        return next((one for one in formats if one.chat_template), self.prompt_format)

    @property
    def clock(self) -> str | None:
        """The moment that a chat template took for now, if one asked."""
        formats = (self.prompt_format, *self.source_formats.values())
        return next((one.clock for one in formats if one.clock), None)


@dataclass(frozen=True)
class _Side:
    """Rows of one side as text.

    Attributes:
        examples: with something to learn; of rows that are read block by block, none is kept.
        rows: how many they came from.
        left_out: those of them that ask or answer nothing.
        contents: hashes that two equal rows share.
    """

    examples: list[Example]
    rows: int
    left_out: Sequence[LeftOut] = ()
    contents: Set[int] = frozenset()


@dataclass(frozen=True)
class _Encoded:
    """One part of the rows: how its prompts are written, and both sides as examples and as ids."""

    part: Part
    format: PromptFormat
    sides: tuple[_Side, _Side]
    rows: tuple[EncodedRows, EncodedRows]
    notes: tuple[str, ...]


def prepare_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    vocab_size: int,
    seed: int,
    *,
    prompt_format: PromptFormat | None = None,
    source_formats: Mapping[str, PromptFormat] | None = None,
    clock: str | None = None,
    store: RowStore | None = None,
) -> PreparedData:
    """Read, check, split, encode and count.

    Args:
        config: the recipe's ``data``; it may name evaluation rows alone.
        tokenizer: the base model's.
        vocab_size: rows of the model's embedding.
        seed: of the split.
        prompt_format: the format kept with an adapter, to evaluate it as it was trained.
        source_formats: likewise those of a mixture's sources.
        clock: the moment that a chat template takes for now; null is the present one.
        store: takes the training rows block by block, so that they are never all in memory.

    Raises:
        DataError: unusable rows, each with its ``file:line``.
        ConfigError: a template or column mapping that does not fit the rows.
        ModelError: a tokenizer that does not fit the model.
    """
    parts = read_parts(config, streamed=store is not None)
    recorded = {**(source_formats or {})}
    if prompt_format is not None:
        recorded[parts[0].name] = prompt_format
    rows = RowTokenizer(tokenizer)

    def prepared(part: Part) -> _Encoded:
        chosen = recorded.get(part.name)
        recognised = chosen is None and part.recognises
        if chosen is None:
            chosen = choose_format(part.config, part.rows)
            chosen = _with_chat_template(chosen, tokenizer, clock)
        return _encoded(part, chosen, rows, seed, recognised=recognised, store=store)

    encoded = in_parts(parts, prepared)
    train, held_out = (_joined([one.rows[side] for one in encoded]) for side in (0, 1))
    rows.check_ids((row.input_ids for row in chain(train.rows, held_out.rows)), vocab_size)
    weights = source_weights(config)
    return PreparedData(
        train=train.rows,
        eval=list(held_out.rows),
        prompts=_generation_prompts(encoded),
        prompt_format=encoded[0].format,
        report=_report(config, encoded, train, held_out),
        fingerprints={n: data_fingerprint(r) for part in parts for n, r in part.read.items()},
        encoded=encoded_fingerprint([train.rows, held_out.rows]),
        pad_id=rows.pad_id if rows.pad_id < vocab_size else rows.end_id,
        source_formats={one.part.name: one.format for one in encoded if one.part.name in weights},
        weights=weights,
    )


def _with_chat_template(
    prompt_format: PromptFormat, tokenizer: Tokenizer, clock: str | None
) -> PromptFormat:
    if prompt_format.format is not RowFormat.messages:
        return prompt_format
    template = chat_template_of(tokenizer)
    moment = (clock or now()) if reads_clock(template) else None
    return replace(prompt_format, chat_template=template, clock=moment)


def _encoded(
    part: Part,
    prompt_format: PromptFormat,
    rows: RowTokenizer,
    seed: int,
    *,
    recognised: bool,
    store: RowStore | None,
) -> _Encoded:
    """A part's rows as ids; those that may be drawn for training say its name."""
    notes = column_notes(part.rows, prompt_format, recognised=recognised)
    encoder = Encoder(rows, prompt_format, part.config)
    if store is None:
        sides = _sides(part, prompt_format, seed)
        train, held_out = (_encode(encoder, part.config, side) for side in sides)
    else:
        try:
            side, train = _streamed(part, prompt_format, encoder, store)
        except LoratuneError:  # a block knows its own problems; they are said of all rows together
            _encode(encoder, part.config, _parsed(list(part.train), prompt_format))
            raise
        sides = (side, _parsed(part.held_out, prompt_format))
        held_out = _encode(encoder, part.config, sides[1])
    train = train.of_source(part.name)
    if not part.held_out:  # rows of data.eval_path belong to no source
        held_out = held_out.of_source(part.name)
    notes = (*notes, *turn_notes(train.rows, held_out.rows))
    return _Encoded(part, prompt_format, sides, (train, held_out), notes)


def _streamed(
    part: Part, prompt_format: PromptFormat, encoder: Encoder, store: RowStore
) -> tuple[_Side, EncodedRows]:
    """Training rows, read and encoded block by block; the store has what is left of them."""
    whole, left_out, contents, count = EncodedRows(), list[LeftOut](), set[int](), 0
    lengths = array("i")
    assert isinstance(part.train, RowsInFiles)
    for block in part.train.blocks(STREAMED_ROWS):
        examples, empty = parse_rows(block, prompt_format)
        encoded = encoder.encode_some(
            examples, max_length=part.config.max_length, overlong=part.config.overlong
        )
        store.add(encoded.rows)
        whole = EncodedRows.joined([whole, replace(encoded, rows=[], kept=[], lengths=[])])
        lengths.extend(encoded.lengths)
        left_out += empty
        contents.update(hash(example.content) for example in examples)
        count += len(block)
    whole = replace(whole, rows=store.finished(), lengths=lengths)
    if len(left_out) == count:
        raise _nothing_to_learn(part.train, left_out, count)
    whole.require_rows(part.config.max_length)
    return _Side([], count, left_out, contents), whole


def _joined(parts: Sequence[EncodedRows]) -> EncodedRows:
    return parts[0] if len(parts) == 1 else EncodedRows.joined(parts)


def _sides(part: Part, prompt_format: PromptFormat, seed: int) -> tuple[_Side, _Side]:
    config, train = part.config, _parsed(list(part.train), prompt_format)
    if config.eval_path is not None or config.eval_fraction == 0:
        return train, _parsed(part.held_out, prompt_format)
    kept, held_out = split_examples(
        train.examples, config.eval_fraction, seed=seed, by=config.split_by
    )
    held_out = held_out[: config.eval_limit]
    rows = len(kept) + len(train.left_out)
    contents = {hash(example.content) for example in kept}
    return _Side(kept, rows, train.left_out, contents), _Side(held_out, len(held_out))


def _parsed(rows: Sequence[Row], prompt_format: PromptFormat) -> _Side:
    examples, left_out = parse_rows(rows, prompt_format)
    if rows and not examples:
        raise _nothing_to_learn(rows, left_out, len(rows))
    return _Side(examples, len(rows), left_out, {hash(example.content) for example in examples})


def _nothing_to_learn(rows: Iterable[Row], left_out: Sequence[LeftOut], count: int) -> DataError:
    why = left_out_words(Counter(row.why for row in left_out))
    number = f"all {count:,} rows are" if count > 1 else "the only row is"
    fix = "use rows with something to learn"
    return DataError(f"{number} {why}", where=next(iter(rows)).source, fix=fix)


def _encode(encoder: Encoder, config: DataConfig, side: _Side) -> EncodedRows:
    return encoder.encode(side.examples, max_length=config.max_length, overlong=config.overlong)


def _generation_prompts(parts: Sequence[_Encoded]) -> list[GenerationPrompt]:
    found: dict[
        tuple[object, ...], tuple[EncodedRow, Example, list[str], list[tuple[int, ...]]]
    ] = {}
    for one in parts:
        examples, encoded = one.sides[1].examples, one.rows[1]
        for row, place in zip(encoded.rows, encoded.kept, strict=True):
            example = examples[place]
            if not example.prompt and not example.messages:
                continue
            _, _, texts, ids = found.setdefault(example.question, (row, example, [], []))
            texts.append(example.last_answer.strip())
            if len(row) == encoded.lengths[place]:
                ids.append(tuple(row.input_ids[row.prompt_length :]))
    return [
        GenerationPrompt(
            row.input_ids[: row.prompt_length],
            texts[0],
            tuple(dict.fromkeys(texts)),
            tuple(dict.fromkeys(ids)),
            row.source,
            example.plain_question,
        )
        for row, example, texts, ids in found.values()
    ]


def _report(
    config: DataConfig, parts: Sequence[_Encoded], train: EncodedRows, held_out: EncodedRows
) -> DataReport:
    reports = [
        _split_report(encoded, [one.sides[side] for one in parts])
        for side, encoded in enumerate((train, held_out))
    ]
    overlap = sum(
        any(hash(row.content) in other.sides[0].contents for other in parts)
        for one in parts
        for row in one.sides[1].examples
    )
    warnings = warnings_of(reports[0], reports[1], overlap, config.max_length)
    notes = [
        f"{one.part.name}: {note}" if one.part.name else note for one in parts for note in one.notes
    ]
    sources = _source_reports(config, parts, train.rows)
    return DataReport(reports[0], reports[1], overlap, warnings, tuple(notes), sources)


def _split_report(encoded: EncodedRows, sides: Sequence[_Side]) -> SplitReport | None:
    rows = sum(side.rows for side in sides)
    left_out = [row for side in sides for row in side.left_out]
    return SplitReport.of(encoded, rows=rows, left_out=left_out) if rows else None


def _source_reports(
    config: DataConfig, parts: Sequence[_Encoded], train: Sequence[EncodedRow]
) -> tuple[SourceReport, ...]:
    weights = source_weights(config)
    mixture = Mixture.of(train, weights)
    if mixture is None:
        return ()
    reports = []
    for one, drawn in zip(parts, mixture.draws, strict=True):
        name, own_eval = one.part.name, not one.part.held_out
        side = _split_report(one.rows[0], [one.sides[0]])
        held_out = _split_report(one.rows[1], [one.sides[1]]) if own_eval else None
        assert side is not None
        path = str(one.part.config.path)
        reports.append(SourceReport(name, path, weights[name], drawn, len(train), side, held_out))
    return tuple(reports)
