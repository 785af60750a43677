"""``chat``: several turns through a pipe and in a terminal, and what the model sees of them."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import CommandLine
from support.served_model import CHAT, LONGEST, adapted_model, chat_tokenizer
from transformers import OPTConfig

from loratune.adapter_files.peft_format import write_adapter
from loratune.config.schema import DataConfig, RowFormat
from loratune.data.encode import Encoder
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import RowTokenizer
from loratune.errors import ConfigError
from loratune.generation import Sampling, generate_answers, stop_ids, stream_answer
from loratune.pipeline.conversation import Conversation
from loratune.surgery import disabled

MESSAGES = PromptFormat(RowFormat.messages, chat_template=CHAT)
INSTRUCTION = PromptFormat(
    RowFormat.instruction, "Q: {instruction}\nA: ", answer="output",
    exchange_template="Q: {instruction}\nA: {answer}\n",
)  # fmt: skip
PATIENCE = 120.0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return chat_tokenizer(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "adapter"
    folder.mkdir()
    facts = {"base_path": "builtin:demo-opt", "prompt_format": MESSAGES.to_dict()}
    write_adapter(folder, adapted_model(), facts, "builtin:demo-opt")
    return folder


def conversation(tokenizer: Any, prompt_format: PromptFormat, **settings: Any) -> Conversation:
    encoder = Encoder(RowTokenizer(tokenizer), prompt_format, DataConfig())
    return Conversation(
        adapted_model(), tokenizer, encoder, prompt_format, Sampling(LONGEST), **settings
    )


def answered(talk: Conversation, text: str) -> str:
    """What the model answers to a prompt in full, not streamed."""
    ids = RowTokenizer(talk.tokenizer).opening_ids([text])
    stops = stop_ids(talk.wrapped.model, talk.tokenizer, talk.prompt_format)
    pad_id = RowTokenizer(talk.tokenizer).pad_id
    (answer,) = generate_answers(
        talk.wrapped.model, talk.tokenizer, ids, talk.sampling, pad_id, stops
    )
    return answer


def test_a_second_question_sees_the_first_and_its_answer(tokenizer: Any) -> None:
    talk, shown = conversation(tokenizer, MESSAGES, system="Be brief."), list[str]()
    first = talk.ask("Who?", shown.append)
    assert first == "".join(shown) == answered(talk, "system: Be brief.\nuser: Who?\nassistant:")
    second = talk.ask("Where?", lambda _: None)
    seen = f"system: Be brief.\nuser: Who?\nassistant: {first}\nuser: Where?\nassistant:"
    assert second == answered(talk, seen)
    with disabled(talk.wrapped):
        expected = answered(talk, seen)
    assert talk.ask_base(lambda _: None) == expected != second
    assert [turn["content"] for turn in talk.as_row()["messages"]] == [
        "Be brief.", "Who?", first, "Where?", second,
    ]  # fmt: skip


def test_earlier_exchanges_stand_where_training_puts_them(tokenizer: Any) -> None:
    talk = conversation(tokenizer, INSTRUCTION)
    first = talk.ask("Who?", lambda _: None)
    assert talk.remembers and first == answered(talk, "Q: Who?\nA: ")
    second = talk.ask("Where?", lambda _: None)
    assert second == answered(talk, f"Q: Who?\nA: {first}\nQ: Where?\nA: ")


def test_a_format_of_single_questions_sees_no_earlier_one(tokenizer: Any) -> None:
    talk = conversation(tokenizer, PromptFormat(RowFormat.prompt, "{prompt}", answer="completion"))
    talk.ask("Who?", lambda _: None)
    assert not talk.remembers
    assert talk.ask("Where?", lambda _: None) == answered(talk, "Where?")


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a model of one answer, which computes nothing."""
    monkeypatch.setattr("loratune.generation.probe_cache", lambda model: True)


@pytest.mark.usefixtures("no_probe")
def test_characters_of_several_tokens_are_shown_whole(tokenizer: Any) -> None:
    text, pieces = "Grüße 😀 中", list[str]()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    model = _Recited(ids)
    stream_answer(model, tokenizer, [5], Sampling(len(ids)), 0, [2], pieces.append)
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 3


@pytest.mark.usefixtures("no_probe")
def test_an_answer_that_is_interrupted_is_as_long_as_it_was(tokenizer: Any) -> None:
    ids = tokenizer("Aye, matey", add_special_tokens=False)["input_ids"]
    pieces: list[str] = []
    answer = stream_answer(
        _Recited(ids, stops_after=2), tokenizer, [5], Sampling(9), 0, [2], pieces.append
    )
    assert answer == "".join(pieces) == tokenizer.decode(ids[:2])


class _Recited(torch.nn.Linear):
    """Says the same to everything, as transformers' ``generate`` says it to a streamer."""

    config = OPTConfig(max_position_embeddings=99)

    def __init__(self, ids: list[int], stops_after: int | None = None) -> None:
        super().__init__(1, 1)
        self._ids, self._stops_after = ids, stops_after

    def generate(self, *, streamer: Any, input_ids: Any, **options: Any) -> None:
        streamer.put(input_ids)
        for place, token in enumerate(self._ids):
            if place == self._stops_after:
                raise KeyboardInterrupt
            streamer.put(torch.tensor([token]))


# -- the command -----------------------------------------------------------------------------


def piped(adapter: Path, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loratune", "chat", f"adapter_path={adapter}", *words]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=PATIENCE)


def test_a_pipe_gets_plain_answers(adapter: Path, tokenizer: Any, tmp_path: Path) -> None:
    saved = tmp_path / "rows.jsonl"
    lines = ["Who?", "", "/base", f"/save {saved}", "/reset", "//slash", f"/save {saved}", "/frob"]
    done = piped(adapter, "\n".join(lines), f"max_new_tokens={LONGEST}")
    talk = conversation(tokenizer, MESSAGES)
    first = talk.ask("Who?", lambda _: None)
    base = talk.ask_base(lambda _: None)
    talk.exchanges.clear()
    third = talk.ask("/slash", lambda _: None)
    assert done.stdout == f"{first}\nbase: {base}\n{third}\n"
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [[turn["content"] for turn in row["messages"]] for row in rows] == [
        ["Who?", first], ["/slash", third],
    ]  # fmt: skip
    assert done.returncode == 2 and "no command '/frob'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_in_a_terminal_mistakes_are_shown_and_it_goes_on(adapter: Path) -> None:
    screen, code = _typed(adapter, ["/base", "/help", "Who?", "/save", "/quit"])
    assert code == 0
    assert "there is no question yet" in screen and "/reset" in screen and "no file named" in screen


def _typed(adapter: Path, lines: list[str]) -> tuple[str, int]:
    """What a terminal shows when ``lines`` are typed, each once the prompt is there; exit code."""
    mine, theirs = pty.openpty()
    words = ["chat", f"adapter_path={adapter}", f"max_new_tokens={LONGEST}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "loratune", *words], stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)
    screen, waiting, ends = "", list(lines), time.monotonic() + PATIENCE
    while time.monotonic() < ends:
        if not select.select([mine], [], [], 1.0)[0]:
            continue
        try:
            screen += os.read(mine, 4096).decode(errors="replace")
        except OSError:
            break
        if waiting and re.search(r"> $", screen):
            os.write(mine, f"{waiting.pop(0)}\n".encode())
            screen += "\n"
    process.wait(PATIENCE)
    os.close(mine)
    return screen, process.returncode


@pytest.mark.parametrize(
    ("word", "message"), [("max_new_tokens=0", "too small"), ("temperature=-1", "negative")]
)
def test_settings_are_checked_before_anything_is_loaded(
    word: str, message: str, adapter: Path, cli: CommandLine
) -> None:
    done = cli("chat", f"adapter_path={adapter}", word)
    assert done.code == 2 and message in done.last


def test_a_system_text_without_a_place_is_refused(tokenizer: Any) -> None:
    single = PromptFormat(RowFormat.prompt, "{prompt}", answer="completion")
    with pytest.raises(ConfigError, match="no place for a system text"):
        conversation(tokenizer, single, system="Be brief.").ask("Who?", lambda _: None)
