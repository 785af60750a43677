"""A conversation with an adapted model, written as the rows of training were."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratune.config.schema import RowFormat, RunConfig
from loratune.data.encode import Encoder
from loratune.data.formats import choose_format, parse_question, question_row
from loratune.data.rows import Row
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import RowTokenizer, Tokenizer
from loratune.generation import Sampling, stop_ids, stream_answer
from loratune.pipeline.commands import load_adapted, prompt_format_of
from loratune.surgery import WrappedModel, disabled

Show = Callable[[str], None]


@dataclass
class Conversation:
    """Questions and answers so far.

    Attributes:
        wrapped: the model.
        tokenizer: its tokenizer.
        encoder: writes prompts as in training.
        prompt_format: how they were written there.
        sampling: how answers are drawn.
        system: a system text that every conversation begins with.
        exchanges: questions and the adapted model's answers.
    """

    wrapped: WrappedModel
    tokenizer: Tokenizer
    encoder: Encoder
    prompt_format: PromptFormat
    sampling: Sampling
    system: str | None = None
    exchanges: list[tuple[str, str]] = field(default_factory=list)

    @property
    def remembers(self) -> bool:
        """Whether the format has a place for earlier questions and answers."""
        chat = self.prompt_format.format is RowFormat.messages
        return chat or bool(self.prompt_format.exchange_template)

    def ask(self, question: str, show: Show) -> str:
        """The adapted model's answer, which the conversation keeps.

        Raises:
            LoratuneError: if the question cannot be written, or leaves no room for an answer.
        """
        answer = self._answer(self._row(question, self.exchanges), show, base=False)
        self.exchanges.append((question, answer))
        return answer

    def ask_base(self, show: Show) -> str:
        """The base model's answer to the last question, which the conversation does not keep.

        Raises:
            LoratuneError: as for ``ask``.
        """
        *earlier, (question, _) = self.exchanges
        return self._answer(self._row(question, earlier), show, base=True)

    def as_row(self) -> dict[str, Any]:
        """The conversation as a row that could be trained on."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in self.exchanges:
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": answer})
        return {"messages": turns}

    def _row(self, question: str, earlier: list[tuple[str, str]]) -> Row:
        row = question_row(question, self.system, self.prompt_format)
        if not earlier or not self.remembers:
            return row
        if self.prompt_format.format is not RowFormat.messages:
            history = [list(exchange) for exchange in earlier]
            return replace(row, columns={**row.columns, "history": history})
        *system, asked = row.columns["messages"]
        turns = [
            {"role": role, "content": text}
            for exchange in earlier
            for role, text in zip(("user", "assistant"), exchange, strict=True)
        ]
        return replace(row, columns={"messages": [*system, *turns, asked]})

    def _answer(self, row: Row, show: Show, *, base: bool) -> str:
        ids = self.encoder.prompt_ids(parse_question(row, self.prompt_format))
        model, pad_id = self.wrapped.model, self.encoder.tokenizer.pad_id
        stops = stop_ids(model, self.tokenizer, self.prompt_format)
        with disabled(self.wrapped) if base else nullcontext():
            return stream_answer(model, self.tokenizer, ids, self.sampling, pad_id, stops, show)


def open_conversation(
    config: RunConfig, folder: Path, sampling: Sampling, system: str | None, *, base_named: bool
) -> Conversation:
    """Load an adapter on its base, to talk to.

    Args:
        config: the recipe.
        folder: the adapter's.
        sampling: how answers are drawn.
        system: a system text.
        base_named: whether ``model`` was chosen, by the user or by a run.

    Raises:
        LoratuneError: an unusable base or adapter, drift, or a format without a system text.
    """
    with redirect_stdout(sys.stderr):  # answers alone go to standard output
        adapter, base, wrapped = load_adapted(config, folder, base_named)
    chosen = prompt_format_of(adapter)
    first = question_row("-", system, chosen)
    prompt_format = chosen or choose_format(config.data, [first])
    encoder = Encoder(RowTokenizer(base.tokenizer), prompt_format, config.data)
    return Conversation(wrapped, base.tokenizer, encoder, prompt_format, sampling, system)
