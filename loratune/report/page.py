"""A report as one self-contained HTML file: no script, nothing fetched, data escaped."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from loratune.console import printable
from loratune.report.charts.chart_frame import Chart
from loratune.tables import Table


@dataclass(frozen=True)
class Folded:
    """Details that open on a click; ``long`` ones are left out in print."""

    title: str
    tables: tuple[Table, ...] = ()
    code: str = ""
    long: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        anchor: its address in the page, never from data.
        title: its heading.
        text: paragraphs.
        samples: each the named texts of one prompt.
    """

    anchor: str
    title: str
    text: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    samples: tuple[tuple[tuple[str, str], ...], ...] = ()
    folded: tuple[Folded, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        parts = (self.text, self.charts, self.tables, self.samples, self.folded)
        return not any(parts)


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        kicker: what kind of report it is.
        title: what it is about.
        verdict: the result in sentences.
        warnings: what weakens or contradicts the result, and what to do.
        cards: the numbers that matter, name and value.
        sections: the rest; empty ones are left out.
        footer: when and by what it was written.
    """

    kicker: str
    title: str
    verdict: tuple[str, ...]
    warnings: tuple[str, ...]
    cards: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    footer: str


def render(page: Page) -> str:
    """The page as HTML.

    Everything in ``page`` is text and is escaped, except the drawings, which were serialized
    from a tree, and the tables, which escape their own cells.  The content-security-policy allows
    the one style sheet, by its hash, and nothing else: no script, no image, no font, no request.
    """
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    values = {field.name: getattr(page, field.name) for field in fields(page)}
    values["sections"] = [section for section in page.sections if not section.empty]
    template = _environment().get_template("page.html.jinja")
    return template.render(**values, style=Markup(style), policy=Markup(policy)) + "\n"


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("loratune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _style() -> str:
    environment = _environment()
    assert environment.loader is not None
    source, _, _ = environment.loader.get_source(environment, "style.css")
    return source


def _finalized(value: Any) -> Any:
    """Text from data with control characters made visible; finished markup as it is."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return value
