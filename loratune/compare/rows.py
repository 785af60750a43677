"""Three kinds of rows that never mix: to train on, to choose by, and for the final numbers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratune.compare.result import Rows
from loratune.config.schema import DataConfig, RunConfig
from loratune.data.encoded_rows import EncodedRow
from loratune.data.prepare import GenerationPrompt, PreparedData, prepare_data
from loratune.data.split import shuffled
from loratune.data.templates import PromptFormat
from loratune.errors import ConfigError, DataError


@dataclass(frozen=True)
class ComparisonRows:
    """Everything that a comparison reads.

    Attributes:
        train: rows to train on.
        dev: rows that choose learning rates; no prompt of theirs is among ``test``.
        test: rows of the final numbers.
        prompts: one for each distinct prompt of ``test``; empty for text rows.
        heldout: text that forgetting is measured on; may be empty.
        pad_id: the id to fill batches with.
        prompt_format: how prompts were written.
        summary: counts, sources, fingerprints and what to know about them.
    """

    train: list[EncodedRow]
    dev: list[EncodedRow]
    test: list[EncodedRow]
    prompts: list[GenerationPrompt]
    heldout: list[EncodedRow]
    pad_id: int
    prompt_format: PromptFormat
    summary: Rows


def question(row: EncodedRow) -> Hashable:
    """What makes rows belong together: the prompt's ids, or the whole row for plain text."""
    cut = row.prompt_length
    return tuple(row.input_ids[:cut]) if cut > 1 else tuple(row.input_ids)


def units(rows: Sequence[EncodedRow]) -> list[list[int]]:
    """Row numbers by question, in the order of first rows: what a bootstrap resamples."""
    groups: dict[Hashable, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(question(row), []).append(number)
    return list(groups.values())


def prepare_comparison(config: RunConfig, tokenizer: Any, vocab_size: int) -> ComparisonRows:
    """Read and split the rows of a recipe.

    With ``data.test_path`` the final rows come from there, and the recipe's evaluation rows
    choose the rates.  Without it the recipe's evaluation rows are the final ones, and whole
    prompts of the training rows are set aside to choose by.

    Raises:
        DataError: unusable rows, or a part that would be empty.
        ConfigError: nothing to evaluate on.
    """
    data, seed = config.data, config.trainer.seed
    _require_evaluation(config)
    first = prepare_data(data, tokenizer, vocab_size, seed)
    test_path = data.test_path
    if test_path is not None:
        other = replace(data, eval_path=test_path, test_path=None)
        final = _evaluation_rows(other, first.prompt_format, tokenizer, vocab_size, seed)
        train, dev = first.train, first.eval
        sources = {"dev": _source(data, data.eval_path), "test": test_path}
    else:
        final = first
        train, dev = split_by_question(first.train, config.compare.dev_fraction, seed)
        sources = {"dev": str(data.path), "test": _source(data, data.eval_path)}
    dev, notes = _without_final(dev, final.eval)
    if not dev:
        raise DataError(
            "no row is left to choose the learning rate by",
            where=sources["dev"],
            fix="raise compare.dev_fraction, or give other rows as data.eval_path",
        )
    heldout = _heldout(config, tokenizer, vocab_size)
    summary = Rows(
        train=len(train),
        dev=len(dev),
        test=len(final.eval),
        prompts=len(final.prompts),
        heldout=len(heldout.eval) if heldout else 0,
        sources={"train": str(data.path), **sources, **_named(config.compare.heldout_path)},
        fingerprints=_fingerprints(first, final, heldout),
        notes=notes + _shared_questions(train, final.eval),
    )
    heldout_rows = heldout.eval if heldout else []
    return ComparisonRows(
        train,
        dev,
        final.eval,
        final.prompts,
        heldout_rows,
        first.pad_id,
        first.prompt_format,
        summary,
    )


def _require_evaluation(config: RunConfig) -> None:
    if config.data.eval_path is None and not config.data.eval_fraction:
        raise ConfigError(
            "there is nothing to evaluate on",
            where="data.eval_path",
            fix="set data.eval_path or data.eval_fraction",
        )


def _source(data: DataConfig, path: str | None) -> str:
    return path if path is not None else f"{data.path} ({data.eval_fraction:g} held out)"


def _named(path: str | None) -> dict[str, str]:
    return {} if path is None else {"heldout": path}


def _evaluation_rows(
    data: DataConfig, prompt_format: PromptFormat, tokenizer: Any, vocab_size: int, seed: int
) -> PreparedData:
    """Evaluation rows alone, written as the training rows are."""
    only = replace(data, path=None, limit=None)
    return prepare_data(only, tokenizer, vocab_size, seed, prompt_format=prompt_format)


def _heldout(config: RunConfig, tokenizer: Any, vocab_size: int) -> PreparedData | None:
    path = config.compare.heldout_path
    if path is None:
        return None
    data = DataConfig(eval_path=path, max_length=config.data.max_length)
    return prepare_data(data, tokenizer, vocab_size, config.trainer.seed)


def split_by_question(
    rows: Sequence[EncodedRow], fraction: float, seed: int
) -> tuple[list[EncodedRow], list[EncodedRow]]:
    """Training rows and rows to choose by; rows of one prompt stay together.

    Raises:
        DataError: if there are not two prompts to part.
    """
    groups = units(rows)
    if len(groups) < 2:
        raise DataError(
            f"{len(groups)} prompts cannot be split into rows to train on and rows to choose by",
            where="data.path",
            fix="add rows, or set data.test_path",
        )
    wanted = min(len(groups) - 1, max(1, round(fraction * len(groups))))
    chosen = {n for place in shuffled(len(groups), seed, 2)[:wanted] for n in groups[place]}
    train = [row for number, row in enumerate(rows) if number not in chosen]
    return train, [row for number, row in enumerate(rows) if number in chosen]


def _without_final(
    dev: Sequence[EncodedRow], final: Sequence[EncodedRow]
) -> tuple[list[EncodedRow], list[str]]:
    """The rows to choose by without any question of the final rows."""
    asked = {question(row) for row in final}
    unasked = [row for row in dev if question(row) not in asked]
    dropped = len(dev) - len(unasked)
    if not dropped:
        return unasked, []
    return unasked, [f"{dropped} dev rows ask a question of the final rows and were left out"]


def _shared_questions(train: Sequence[EncodedRow], final: Sequence[EncodedRow]) -> list[str]:
    asked = {question(row) for row in final}
    shared = sum(question(row) in asked for row in train)
    if not shared:
        return []
    return [f"{shared} training rows ask a question of the final rows: the scores flatter all"]


def _fingerprints(
    first: PreparedData, final: PreparedData, heldout: PreparedData | None
) -> dict[str, str]:
    prints = {f"recipe_{name}": value for name, value in first.fingerprints.items()}
    prints["test"] = final.fingerprint
    if heldout is not None:
        prints["heldout"] = heldout.fingerprint
    return prints
