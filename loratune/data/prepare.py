"""From a recipe's ``data`` to rows of ids, in one call."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loratune.config.schema import DataConfig, RowFormat
from loratune.data.chat import chat_template_of
from loratune.data.clock import now, reads_clock
from loratune.data.columns import column_notes
from loratune.data.encode import Encoder
from loratune.data.encoded_rows import EncodedRow, EncodedRows, encoded_fingerprint
from loratune.data.formats import choose_format, parse_rows
from loratune.data.reading import read_rows
from loratune.data.report import DataReport, SplitReport, turn_notes, warnings_of
from loratune.data.rows import Example, Row, data_fingerprint
from loratune.data.split import split_examples
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import RowTokenizer, Tokenizer
from loratune.errors import DataError


@dataclass(frozen=True)
class GenerationPrompt:
    """A prompt of the evaluation rows, once, with all the answers that rows give to it.

    Attributes:
        prompt_ids: what generation is given, start token included.
        answer: the first row's answer, without white space around it.
        references: every distinct answer, likewise.
        answer_ids: the distinct answers as training saw them, of rows that were not cut short.
        source: ``file:line`` of the first row.
    """

    prompt_ids: list[int]
    answer: str
    references: tuple[str, ...]
    answer_ids: tuple[tuple[int, ...], ...]
    source: str


@dataclass(frozen=True)
class PreparedData:
    """Rows ready for training and evaluation.

    Attributes:
        train: training rows; empty if only evaluation rows were asked for.
        eval: evaluation rows; may be empty.
        prompts: one for each distinct prompt of ``eval``; empty for text rows.
        prompt_format: how prompts were written; kept with the adapter.
        report: what became of the rows.
        fingerprints: ``train`` and ``eval`` to the sha256 of the rows read, in order.
        encoded: one sha256 of what became of them: ids and supervised positions.
        pad_id: the id to fill batches with.
    """

    train: list[EncodedRow]
    eval: list[EncodedRow]
    prompts: list[GenerationPrompt]
    prompt_format: PromptFormat
    report: DataReport
    fingerprints: dict[str, str]
    encoded: str
    pad_id: int

    @property
    def fingerprint(self) -> str:
        """One sha256 for all rows."""
        return hashlib.sha256(repr(sorted(self.fingerprints.items())).encode()).hexdigest()


@dataclass(frozen=True)
class _Side:
    """Examples of one side and how many rows they came from."""

    examples: list[Example]
    rows: int
    empty: int


def prepare_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    vocab_size: int,
    seed: int,
    *,
    prompt_format: PromptFormat | None = None,
    clock: str | None = None,
) -> PreparedData:
    """Read, check, split, encode and count.

    Args:
        config: the recipe's ``data``; ``path`` may be null where ``eval_path`` is not.
        tokenizer: the base model's.
        vocab_size: rows of the model's embedding.
        seed: of the split.
        prompt_format: the format kept with an adapter, to evaluate it as it was trained.
        clock: the moment that a chat template takes for now; null is the present one.

    Raises:
        DataError: unusable rows, each with its ``file:line``.
        ConfigError: a template or column mapping that does not fit the rows.
        ModelError: a tokenizer that does not fit the model.
    """
    read = _read(config)
    recognised = prompt_format is None and config.template is None
    recognised = recognised and config.format is RowFormat.auto
    if prompt_format is None:
        prompt_format = choose_format(config, _first(read))
        prompt_format = _with_chat_template(prompt_format, tokenizer, clock)
    train, held_out = _sides(config, read, prompt_format, seed)
    every = [row for part in read.values() for row in part]
    notes = column_notes(every, prompt_format, recognised=recognised)
    rows = RowTokenizer(tokenizer)
    encoder = Encoder(rows, prompt_format, config)
    encoded = [_encode(encoder, config, side) for side in (train, held_out)]
    rows.check_ids((row.input_ids for part in encoded for row in part.rows), vocab_size)
    pad_id = rows.pad_id if rows.pad_id < vocab_size else rows.end_id
    return PreparedData(
        train=encoded[0].rows,
        eval=encoded[1].rows,
        prompts=_generation_prompts(held_out, encoded[1]),
        prompt_format=prompt_format,
        report=replace(
            _report(config, train, held_out, encoded),
            notes=(*notes, *turn_notes([row for part in encoded for row in part.rows])),
        ),
        fingerprints={name: data_fingerprint(part) for name, part in read.items()},
        encoded=encoded_fingerprint([part.rows for part in encoded]),
        pad_id=pad_id,
    )


def _read(config: DataConfig) -> dict[str, list[Row]]:
    read = {}
    if config.path is not None:
        read["train"] = read_rows(config.path, split=config.split, limit=config.limit)
    if config.eval_path is not None:
        read["eval"] = read_rows(
            config.eval_path, split=config.split, limit=config.eval_limit, key="data.eval_path"
        )
    if not read:
        raise DataError("no data", where="data.path", fix="set data.path to a file of rows")
    return read


def _first(read: dict[str, list[Row]]) -> list[Row]:
    return next(iter(read.values()))


def _with_chat_template(
    prompt_format: PromptFormat, tokenizer: Tokenizer, clock: str | None
) -> PromptFormat:
    if prompt_format.format is not RowFormat.messages:
        return prompt_format
    template = chat_template_of(tokenizer)
    moment = (clock or now()) if reads_clock(template) else None
    return replace(prompt_format, chat_template=template, clock=moment)


def _sides(
    config: DataConfig, read: dict[str, list[Row]], prompt_format: PromptFormat, seed: int
) -> tuple[_Side, _Side]:
    train = _parsed(read.get("train", []), prompt_format)
    if config.eval_path is not None or config.eval_fraction == 0:
        return train, _parsed(read.get("eval", []), prompt_format)
    kept, held_out = split_examples(
        train.examples, config.eval_fraction, seed=seed, by=config.split_by
    )
    held_out = held_out[: config.eval_limit]
    rows = len(kept) + train.empty
    return _Side(kept, rows, train.empty), _Side(held_out, len(held_out), 0)


def _parsed(rows: Sequence[Row], prompt_format: PromptFormat) -> _Side:
    examples, empty = parse_rows(rows, prompt_format)
    if rows and not examples:
        cause = f"all {len(rows)} rows are empty (null, or only white space)"
        raise DataError(cause, where=rows[0].source)
    return _Side(examples, len(rows), empty)


def _encode(encoder: Encoder, config: DataConfig, side: _Side) -> EncodedRows:
    return encoder.encode(side.examples, max_length=config.max_length, overlong=config.overlong)


def _generation_prompts(side: _Side, encoded: EncodedRows) -> list[GenerationPrompt]:
    found: dict[tuple[object, ...], tuple[EncodedRow, list[str], list[tuple[int, ...]]]] = {}
    for row, place in zip(encoded.rows, encoded.kept, strict=True):
        example = side.examples[place]
        if not example.prompt and not example.messages:
            continue
        _, texts, ids = found.setdefault(example.question, (row, [], []))
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
        )
        for row, texts, ids in found.values()
    ]


def _report(
    config: DataConfig, train: _Side, held_out: _Side, encoded: Sequence[EncodedRows]
) -> DataReport:
    reports = [
        SplitReport.of(part, rows=side.rows, empty=side.empty) if side.rows else None
        for side, part in zip((train, held_out), encoded, strict=True)
    ]
    known = {example.content for example in train.examples}
    overlap = sum(example.content in known for example in held_out.examples)
    warnings = warnings_of(reports[0], reports[1], overlap, config.max_length)
    return DataReport(reports[0], reports[1], overlap, warnings)
