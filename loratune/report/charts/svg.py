"""Inline SVG as a tree of elements: text from data can only ever become text."""

from __future__ import annotations

from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from markupsafe import Markup

from loratune.console import printable

FONT = 13.0
_WIDTH_OF_A_CHARACTER = 0.62


def canvas(width: float, height: float, label: str) -> Element:
    """An empty drawing; ``label`` is what a screen reader says."""
    box = f"0 0 {width:g} {height:g}"
    return Element("svg", {"viewBox": box, "role": "img", "aria-label": clean(label)})


def add(parent: Element, tag: str, text: str | None = None, **attributes: str | float) -> Element:
    """Append an element; ``stroke_width`` becomes ``stroke-width``, ``class_`` ``class``."""
    named = {key.rstrip("_").replace("_", "-"): _value(item) for key, item in attributes.items()}
    child = SubElement(parent, tag, named)
    if text is not None:
        child.text = clean(text)
    return child


def _value(item: str | float) -> str:
    return clean(item) if isinstance(item, str) else f"{item:.2f}".rstrip("0").rstrip(".")


def clean(text: str) -> str:
    """``text`` with characters that XML forbids made visible."""
    return printable(text)


def to_markup(root: Element) -> Markup:
    """The drawing as HTML; everything in it was escaped by the serializer."""
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def text_width(text: str, size: float = FONT) -> float:
    """About how wide a text is, rather too wide than too narrow."""
    return len(text) * size * _WIDTH_OF_A_CHARACTER


def shorten(text: str, most: int) -> str:
    """``text`` cut to ``most`` characters, the cut marked."""
    return text if len(text) <= most else text[: most - 1] + "…"
