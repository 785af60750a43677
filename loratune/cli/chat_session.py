"""Questions from a terminal or a pipe, commands among them, and answers as they are written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from loratune import files
from loratune.console import printable
from loratune.errors import ConfigError, LoratuneError, choose_one
from loratune.runs.run_dir import check_result_file

if TYPE_CHECKING:
    from loratune.pipeline.conversation import Conversation

HELP = """/base        the base model's answer to the last question
/reset       begin again
/save FILE   add the conversation to a file, as a row that could be trained on
/quit        end (also Ctrl-D); Ctrl-C stops an answer
/help        this; a question that begins with / is written with //"""
_PROMPT = "> "


class ChatSession:
    """One session: a person at a terminal, or lines of a pipe.

    Args:
        conversation: with the model.
        interactive: whether a person is there: mistakes are shown and the session goes on.
    """

    def __init__(self, conversation: Conversation, *, interactive: bool) -> None:
        self._conversation, self._interactive = conversation, interactive
        self._commands: dict[str, Callable[[str], None]] = {
            "/base": self._base,
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: self._note(HELP),
        }

    def run(self) -> None:
        """Answer line by line until there is none, or ``/quit``.

        Raises:
            LoratuneError: where nobody is there to see it.
        """
        self._welcome()
        for line in self._lines():
            if line.strip() == "/quit":
                return
            try:
                self._take(line)
            except LoratuneError as error:
                if not self._interactive:
                    raise
                self._note("\n".join(error.lines()))

    def _welcome(self) -> None:
        if not self._interactive:
            return
        self._note("Ask, or /help.")
        if not self._conversation.remembers:
            self._note("The adapter was trained on single questions: earlier ones are not seen.")

    def _lines(self) -> Iterator[str]:
        if not self._interactive:
            yield from (line.rstrip("\r\n") for line in sys.stdin)
            return
        import readline  # noqa: F401  (arrow keys and earlier lines)

        while True:
            try:
                yield input(_PROMPT)
            except KeyboardInterrupt:  # meant for an answer, or for the line
                print()
            except EOFError:
                print()
                return

    def _take(self, line: str) -> None:
        """Answer a question or carry out a command.

        Raises:
            LoratuneError: if that is impossible.
        """
        if not line.strip():
            return
        if not line.startswith("/") or line.startswith("//"):
            self._answered(line.removeprefix("/"))
            return
        word, _, argument = line.strip().partition(" ")
        if word not in self._commands:
            fix = choose_one(word, [*self._commands, "/quit"])
            raise ConfigError(f"no command '{word}'", where="chat", fix=fix)
        self._commands[word](argument.strip())

    def _answered(self, question: str) -> None:
        self._conversation.ask(question, _show)
        print(flush=True)

    def _base(self, _: str) -> None:
        if not self._conversation.exchanges:
            raise ConfigError("there is no question yet", where="/base", fix="ask one")
        print("base: ", end="")
        self._conversation.ask_base(_show)
        print(flush=True)

    def _reset(self, _: str) -> None:
        self._conversation.exchanges.clear()
        self._note("The conversation begins again.")

    def _save(self, argument: str) -> None:
        if not argument:
            raise ConfigError("no file named", where="/save", fix="/save FILE.jsonl")
        if not self._conversation.exchanges:
            raise ConfigError("there is nothing to save yet", where="/save", fix="ask something")
        path = Path(argument).expanduser()
        check_result_file(path)
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        row = json.dumps(self._conversation.as_row(), ensure_ascii=False)
        files.write_text(path, f"{before}{row}\n")
        self._note(f"added to {path}")

    def _note(self, text: str) -> None:
        """For a person; a pipe's output holds answers alone."""
        print(printable(text), file=sys.stdout if self._interactive else sys.stderr)


def _show(text: str) -> None:
    print(printable(text), end="", flush=True)
