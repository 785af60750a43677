"""Chat templates are programs by strangers: run in a sandbox, briefly, in little memory.

transformers' Jinja sandbox keeps a template from reaching Python.  It bounds neither time nor
memory, which is done here.  One operation on huge integers cannot be interrupted at all, so the
two that make them, ``**`` and a product of two computed values, are refused beforehand; no chat
template has a use for them.
"""

from __future__ import annotations

import math
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.data.clock import with_clock
from loratune.data.numbers import StandIns, Written, written_twice
from loratune.data.tokenizing import Tokenizer
from loratune.errors import DataError, LoratuneError, SecurityError

if TYPE_CHECKING:
    from jinja2 import nodes

Turns = Sequence[Mapping[str, Any]]

SECONDS = 2.0
_MEMORY = 512 << 20
_LONGEST = 200_000
_PROBE = "quartz"
_SHOWN = 40
FIX = "use the chat template of the original model"


class TemplateRenderer:
    """Runs one chat template.

    Args:
        tokenizer: has the special tokens that the template writes.
        template: its source.
        clock: the moment that the template takes for now.

    Raises:
        DataError: if it is not a template.
        SecurityError: if it could not be stopped once it runs.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, clock: str | None = None) -> None:
        check_template(template)
        self._tokenizer = tokenizer
        self._template = with_clock(template, clock)
        self._takes_parts = False
        self._takes_parts = self._needs_parts()

    def text(self, turns: Turns, *, generation: bool, tools: Sequence[Any] | None) -> str:
        """A conversation as text, with the header of the assistant's next turn if asked for.

        Raises:
            DataError: if the template raises.
            SecurityError: if it takes too long or too much.
        """

        def write(given: Any) -> Written:
            text = self._tokenizer.apply_chat_template(
                given[0],
                chat_template=self._template,
                tools=given[1],
                add_generation_prompt=generation,
                tokenize=False,
            )
            return str(text), []

        return self._written(turns, tools, write)[0]

    def marked(
        self, turns: Turns, tools: Sequence[Any] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as text, and the character ranges inside ``{% generation %}``.

        Raises:
            DataError: if the template raises.
            SecurityError: if it takes too long or too much.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        def write(given: Any) -> Written:
            rendered: Any = render_jinja_template(
                conversations=[given[0]],
                tools=given[1],
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **getattr(self._tokenizer, "special_tokens_map", {}),
            )
            return rendered[0][0], [(int(start), int(end)) for start, end in rendered[1][0]]

        return self._written(turns, tools, write)

    def _written(
        self, turns: Turns, tools: Sequence[Any] | None, write: Callable[[Any], Written]
    ) -> Written:
        """What the template writes, numbers as they stand in the file."""
        given = [[self._as_taken(turn) for turn in turns], None if tools is None else list(tools)]
        with _named_errors(), bounded():
            written = written_twice(given, write)
            if written is not None:
                return written
            for literal in StandIns(given).literals:
                if math.isinf(float(literal)):
                    cause = f"the chat template reckons with {literal[:_SHOWN]}, which is too large"
                    raise DataError(cause, fix="write it as text")
            return write(given)

    def _as_taken(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        """The turn with its text as a part of a list, where the template writes only those."""
        if not self._takes_parts:
            return dict(turn)
        return {**turn, "content": [{"type": "text", "text": turn["content"]}]}

    def _needs_parts(self) -> bool:
        """Templates of vision models may write the parts of a list, and no text by itself."""

        def writes(content: object) -> bool:
            try:
                turns = [{"role": "user", "content": content}]
                return _PROBE in self.text(turns, generation=False, tools=None)
            except DataError:
                return False

        return not writes(_PROBE) and writes([{"type": "text", "text": _PROBE}])


@contextmanager
def _named_errors() -> Iterator[None]:
    """A template is a program of its own and may raise anything."""
    try:
        yield
    except LoratuneError:
        raise
    except Exception as error:
        if type(error).__name__ == "SecurityError":  # the sandbox's own
            cause = f"the chat template reaches for the program: {error}"
            raise SecurityError(cause, fix=FIX) from error
        reason = str(error).partition("\n")[0][:200]
        cause = f"the chat template raised {type(error).__name__}: {reason}"
        raise DataError(cause, fix="fix the row's turns") from error


def check_template(template: str) -> None:
    """Refuse what could not be stopped once it runs.

    Raises:
        DataError: if it is not a Jinja template.
        SecurityError: if it is longer than any honest one, or makes huge numbers.
    """
    from jinja2 import nodes

    tree = parse_template(template)
    for node in tree.find_all((nodes.Pow, nodes.Mul)):
        constant = isinstance(node.left, nodes.Const) or isinstance(node.right, nodes.Const)
        if isinstance(node, nodes.Pow) or not constant:
            raise SecurityError(
                "the chat template computes powers or products that may never end",
                where=f"chat template, line {node.lineno}",
                fix=FIX,
            )


def parse_template(template: str) -> nodes.Template:
    """The template's syntax tree.

    Raises:
        DataError: if it is not a Jinja template.
        SecurityError: if it is longer than any honest one.
    """
    import jinja2

    if len(template) > _LONGEST:
        cause = f"the chat template has {len(template):,} characters"
        raise SecurityError(cause, where="tokenizer", fix=FIX)
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _generation_tag()])
    try:
        return environment.parse(template)
    except jinja2.TemplateSyntaxError as error:
        cause = f"the chat template is broken: {error.message}"
        where = f"chat template, line {error.lineno}"
        raise DataError(cause, where=where, fix=FIX) from error
    except RecursionError as error:
        cause = "the chat template is nested too deeply"
        raise SecurityError(cause, where="tokenizer", fix=FIX) from error


def _generation_tag() -> type:
    """``{% generation %}``, which transformers adds to the language; parsed here, never run."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return GenerationTag


@contextmanager
def bounded() -> Iterator[None]:
    """Let the block take two seconds of processor time and half a gigabyte more than now.

    Outside the main thread, where no signal arrives, the block runs unbounded.

    Raises:
        SecurityError: if it takes more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGPROF, _too_long)
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        _limit_memory(limits)
        yield
    except MemoryError as error:
        cause = f"the chat template wants more than {_MEMORY >> 20} MB for one row"
        raise SecurityError(cause, where="tokenizer", fix=FIX) from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _too_long(*_: object) -> None:
    cause = f"the chat template took longer than {SECONDS:g} s for one row"
    raise SecurityError(cause, where="tokenizer", fix=FIX)


def _limit_memory(limits: tuple[int, int]) -> None:
    soft, hard = limits
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return  # no such file on this system: time alone is bounded
    allowed = pages * resource.getpagesize() + _MEMORY
    if soft == resource.RLIM_INFINITY or allowed < soft:
        resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
