"""Three kinds of rows that never mix: to train on, to choose by, and for the final numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from loratune.compare.result import Rows
from loratune.config.mixture import training_paths
from loratune.config.schema import DataConfig, RunConfig
from loratune.data.clock import now
from loratune.data.encoded_rows import EncodedRow
from loratune.data.prepare import GenerationPrompt, PreparedData, prepare_data
from loratune.data.questions import question, units
from loratune.data.reading import read_for
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
        clock: the moment that a chat template took for now, where one asked.
        summary: counts, sources, fingerprints and what to know about them.
    """

    train: list[EncodedRow]
    dev: list[EncodedRow]
    test: list[EncodedRow]
    prompts: list[GenerationPrompt]
    heldout: list[EncodedRow]
    pad_id: int
    prompt_format: PromptFormat
    clock: str | None
    summary: Rows

    @property
    def every(self) -> list[EncodedRow]:
        """The rows of all parts."""
        return [*self.train, *self.dev, *self.test, *self.heldout]


def prepare_comparison(
    config: RunConfig, tokenizer: Any, vocab_size: int, clock: str | None = None
) -> ComparisonRows:
    """Read and split the rows of a recipe.

    With ``data.test_path`` the final rows come from there, and the recipe's evaluation rows
    choose the rates.  Without it the recipe's evaluation rows are the final ones, and whole
    prompts of the training rows are set aside to choose by.

    Args:
        config: the recipe.
        tokenizer: the base model's.
        vocab_size: rows of the model's embedding.
        clock: the moment that a chat template takes for now; null is the present one.

    Raises:
        DataError: unusable rows, or a part that would be empty.
        ConfigError: nothing to evaluate on.
    """
    data, seed = config.data, config.trainer.seed
    if data.eval_path is None and not data.eval_fraction:
        fix = "set data.eval_path or data.eval_fraction"
        raise ConfigError("there is nothing to evaluate on", where="data.eval_path", fix=fix)
    read = partial(
        prepare_data, tokenizer=tokenizer, vocab_size=vocab_size, seed=seed, clock=clock or now()
    )
    first = read(data)
    train, dev, final, sources = _split(config, first, read)
    dev, notes = _without_final(dev, final.eval, sources["dev"])
    fingerprints = {f"recipe_{name}": value for name, value in first.fingerprints.items()}
    fingerprints["test"] = final.fingerprint
    heldout: list[EncodedRow] = []
    stopped_at = first.clock
    if config.compare.heldout_path is not None:
        text = DataConfig(eval_path=config.compare.heldout_path, max_length=data.max_length)
        with read_for("compare.heldout_path"):
            prepared = read(text)
        heldout, sources["heldout"] = prepared.eval, config.compare.heldout_path
        fingerprints["heldout"] = prepared.fingerprint
        stopped_at = stopped_at or prepared.clock
    parts = {"train": train, "dev": dev, "test": final.eval, "heldout": heldout}
    summary = Rows(
        **{name: len(rows) for name, rows in parts.items()},
        prompts=len(final.prompts),
        sources=sources,
        fingerprints=fingerprints,
        notes=notes + _shared_questions(train, final.eval),
    )
    return ComparisonRows(
        **parts,
        prompts=final.prompts,
        pad_id=first.pad_id,
        prompt_format=first.answer_format,
        clock=stopped_at,
        summary=summary,
    )


def _split(
    config: RunConfig, first: PreparedData, read: Callable[..., PreparedData]
) -> tuple[list[EncodedRow], list[EncodedRow], PreparedData, dict[str, str]]:
    """Rows to train on and to choose by, the final rows, and where each lie."""
    data = config.data
    paths = ", ".join(training_paths(data))
    evaluation = data.eval_path or f"{paths} ({data.eval_fraction:g} held out)"
    sources = {"train": paths, "dev": evaluation, "test": evaluation}
    if data.test_path is not None:
        only = replace(
            data, path=None, sources=None, limit=None, eval_path=data.test_path, test_path=None
        )
        with read_for("data.test_path"):
            final = read(only, prompt_format=first.prompt_format)
        return list(first.train), first.eval, final, sources | {"test": data.test_path}
    fraction, seed = config.compare.dev_fraction, config.trainer.seed
    train, dev = split_by_question(first.train, fraction, seed)
    return train, dev, first, sources | {"dev": paths}


def split_by_question(
    rows: Sequence[EncodedRow], fraction: float, seed: int
) -> tuple[list[EncodedRow], list[EncodedRow]]:
    """Training rows and rows to choose by; rows of one prompt stay together.

    Of a mixture, every source gives its share.

    Raises:
        DataError: if there are not two prompts to part.
    """
    by_source: dict[str, list[list[int]]] = {}
    for group in units(rows):
        by_source.setdefault(rows[group[0]].origin, []).append(group)
    chosen: set[int] = set()
    for name, groups in by_source.items() or [("", [])]:
        chosen |= _chosen(groups, fraction, seed, f"source {name}" if name else "data.path")
    train = [row for number, row in enumerate(rows) if number not in chosen]
    return train, [row for number, row in enumerate(rows) if number in chosen]


def _chosen(groups: list[list[int]], fraction: float, seed: int, where: str) -> set[int]:
    """Numbers of the rows to choose by, whole groups of them."""
    if len(groups) < 2:
        raise DataError(
            f"{len(groups)} prompts cannot be split into rows to train on and rows to choose by",
            where=where,
            fix="add rows, or set data.test_path",
        )
    wanted = min(len(groups) - 1, max(1, round(fraction * len(groups))))
    return {n for place in shuffled(len(groups), seed, 2)[:wanted] for n in groups[place]}


def _without_final(
    dev: Sequence[EncodedRow], final: Sequence[EncodedRow], source: str
) -> tuple[list[EncodedRow], list[str]]:
    """The rows to choose by without any question of the final rows, and what to know of it.

    Raises:
        DataError: if none is left.
    """
    asked = {question(row) for row in final}
    unasked = [row for row in dev if question(row) not in asked]
    if not unasked:
        raise DataError(
            "no row is left to choose the learning rate by",
            where=source,
            fix="raise compare.dev_fraction, or give other rows as data.eval_path",
        )
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
