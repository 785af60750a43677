"""Chat templates are programs by strangers: run in a sandbox, briefly, in little memory.

transformers' Jinja sandbox keeps a template from reaching Python.  It bounds neither time nor
memory, which is done here.  One operation on huge integers cannot be interrupted at all, so the
two that make them, ``**`` and a product of two computed values, are refused beforehand; no chat
template has a use for them.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.data.clock import with_clock
from loratune.data.tokenizing import Tokenizer
from loratune.errors import DataError, SecurityError

if TYPE_CHECKING:
    from jinja2 import nodes

Turns = Sequence[Mapping[str, Any]]

SECONDS = 2.0
_MEMORY = 512 << 20
_LONGEST = 200_000
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

    def text(self, turns: Turns, *, generation: bool, tools: Sequence[Any] | None) -> str:
        """A conversation as text, with the header of the assistant's next turn if asked for.

        Raises:
            DataError: if the template raises.
            SecurityError: if it takes too long or too much.
        """
        with _named_errors(), bounded():
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(turn) for turn in turns],
                    chat_template=self._template,
                    tools=tools,
                    add_generation_prompt=generation,
                    tokenize=False,
                )
            )

    def marked(
        self, turns: Turns, tools: Sequence[Any] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as text, and the character ranges inside ``{% generation %}``.

        Raises:
            DataError: if the template raises.
            SecurityError: if it takes too long or too much.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        with _named_errors(), bounded():
            rendered: Any = render_jinja_template(
                conversations=[[dict(turn) for turn in turns]],
                tools=tools,
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **getattr(self._tokenizer, "special_tokens_map", {}),
            )
        return rendered[0][0], [(int(start), int(end)) for start, end in rendered[1][0]]


@contextmanager
def _named_errors() -> Iterator[None]:
    """A template is a program of its own and may raise anything."""
    try:
        yield
    except SecurityError:
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
