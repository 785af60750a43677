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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loratune.errors import DataError, SecurityError

SECONDS = 2.0
_MEMORY = 512 << 20
_LONGEST = 200_000
FIX = "use the chat template of the original model"


def check_template(template: str) -> None:
    """Refuse what could not be stopped once it runs.

    Raises:
        DataError: if it is not a Jinja template.
        SecurityError: if it is longer than any honest one, or makes huge numbers.
    """
    import jinja2
    from jinja2 import nodes

    if len(template) > _LONGEST:
        cause = f"the chat template has {len(template):,} characters"
        raise SecurityError(cause, where="tokenizer", fix=FIX)
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _generation_tag()])
    try:
        tree = environment.parse(template)
    except jinja2.TemplateSyntaxError as error:
        cause = f"the chat template is broken: {error.message}"
        where = f"chat template, line {error.lineno}"
        raise DataError(cause, where=where, fix=FIX) from error
    except RecursionError as error:
        cause = "the chat template is nested too deeply"
        raise SecurityError(cause, where="tokenizer", fix=FIX) from error
    for node in tree.find_all((nodes.Pow, nodes.Mul)):
        constant = isinstance(node.left, nodes.Const) or isinstance(node.right, nodes.Const)
        if isinstance(node, nodes.Pow) or not constant:
            raise SecurityError(
                "the chat template computes powers or products that may never end",
                where=f"chat template, line {node.lineno}",
                fix=FIX,
            )


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
    """Let the block take two seconds and half a gigabyte more than there is now.

    Outside the main thread, where no signal arrives, the block runs unbounded.

    Raises:
        SecurityError: if it takes more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, _too_long)
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        _limit_memory(limits)
        yield
    except MemoryError as error:
        cause = f"the chat template wants more than {_MEMORY >> 20} MB for one row"
        raise SecurityError(cause, where="tokenizer", fix=FIX) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
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
