"""How a row's columns become the text before the answer, in training, evaluation and generation.

A ``PromptFormat`` is data: it is kept with the adapter, so that ``generate`` and ``evaluate``
write exactly the prompts that training wrote.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from loratune.config.schema import RowFormat
from loratune.data.json_rows import parse_json
from loratune.data.rows import Number, listed, shown
from loratune.errors import ConfigError, DataError, did_you_mean

PLAIN_TEMPLATE = "{prompt}"
INSTRUCTION_TEMPLATE = "### Instruction\n{instruction}\n\n### Answer\n"
INSTRUCTION_WITH_INPUT_TEMPLATE = (
    "### Instruction\n{instruction}\n\n### Input\n{input}\n\n### Answer\n"
)
SYSTEM_TEMPLATE = "### System\n{system}\n\n"
EXCHANGE_TEMPLATE = "### Instruction\n{instruction}\n\n### Answer\n{answer}\n\n"


@dataclass(frozen=True)
class PromptFormat:
    """Everything needed to write a prompt again.

    Attributes:
        format: text, prompt, instruction or messages; never auto.
        template: prompt text with ``{column}`` placeholders; None for text and messages.
        input_template: used instead where the row has an ``input``; instruction rows only.
        answer: the column to learn.
        columns: our column name to the user's; empty for a column to be left out.
        system_template: goes before the template where the row has a ``system`` text; empty in a
            format that has no place for one.
        exchange_template: an earlier question and its answer, for every pair of ``history``.
        chat_template: the tokenizer's Jinja template that training used; messages only.
        clock: the moment that the chat template took for now, if it asked.
    """

    format: RowFormat
    template: str | None = None
    input_template: str | None = None
    answer: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    system_template: str = ""
    exchange_template: str = ""
    clock: str | None = None

    def named(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """A row's columns under our names; the user's own names stay usable beside them."""
        ours = {our: columns[theirs] for our, theirs in self.columns.items() if theirs in columns}
        left_out = [our for our, theirs in self.columns.items() if not theirs]
        named = {**columns, **ours}
        for our in left_out:
            named.pop(our, None)
        return named

    def prompt(self, columns: Mapping[str, Any]) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The text before the answer, and where in it the row's own words stand.

        Args:
            columns: the row under the user's names or ours.

        Raises:
            ConfigError: if the template names a column that the row lacks.
            DataError: if a column that it names holds no text.
        """
        named = self.named(columns)
        template = self.template or ""
        if self.input_template is not None and not is_blank(named.get("input")):
            template = self.input_template
        parts = [(template, named)]
        if self.exchange_template:
            exchanges = read_history(named.get("history"))
            parts[:0] = [(self.exchange_template, exchange) for exchange in exchanges]
        if self.system_template and not is_blank(named.get("system")):
            parts.insert(0, (self.system_template, named))
        written, values = "", list[tuple[int, int]]()
        for part, texts in parts:
            text, places = substitute(part, texts)
            values += [(start + len(written), end + len(written)) for start, end in places]
            written += text
        return written, tuple(values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values, for ``loratune.json`` beside the adapter."""
        values = {**asdict(self), "format": str(self.format), "columns": dict(self.columns)}
        return {key: value for key, value in values.items() if key != "clock" or value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptFormat:
        """The format that ``to_dict`` wrote.

        Raises:
            ConfigError: for an unknown key or format.
        """
        try:
            return cls(**{**values, "format": RowFormat(values["format"])})
        except (KeyError, TypeError, ValueError) as error:
            cause = f"the prompt format kept with the adapter is damaged: {error}"
            raise ConfigError(cause, where="prompt_format") from error


def placeholders(template: str) -> list[str]:
    """The column names in braces, each once, in order; ``{{`` and ``}}`` are plain braces.

    Raises:
        ConfigError: for a single brace, an empty name, or more than a name between braces.
    """
    return list(dict.fromkeys(name for _, name in _pieces(template) if name is not None))


def substitute(
    template: str, columns: Mapping[str, Any]
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """``template`` with every ``{column}`` replaced by the column's text, and nothing else.

    Values are put in as they are: braces in them have no meaning, and attributes, indices,
    conversions and format specifications are refused.

    Returns:
        The text, and the character range of every value in it.

    Raises:
        ConfigError: for a placeholder that names no column.
        DataError: for a column that holds no text.
    """
    written, values = "", []
    for literal, name in _pieces(template):
        written += literal
        if name is not None:
            check_placeholder(name, columns)
            start = len(written)
            written += as_text(columns[name], name)
            values.append((start, len(written)))
    return written, tuple(values)


def check_placeholder(name: str, columns: Mapping[str, Any]) -> None:
    """Raise unless the row has the column.

    Raises:
        ConfigError: naming the columns there are.
    """
    if name not in columns:
        fix = did_you_mean(name, columns) or f"the rows have {listed(columns)}"
        cause = f"the template's placeholder {{{name}}} names no column"
        raise ConfigError(cause, where="data.template", fix=fix)


@lru_cache(maxsize=64)
def _pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """Literal text and the placeholder after it, if any."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        fix = "write {{ and }} for braces that are not placeholders"
        raise ConfigError(f"bad template: {error}", where="data.template", fix=fix) from error
    for _, name, spec, conversion in parsed:
        if name is None:
            continue
        if spec or conversion or not name or name.isdigit() or any(c in name for c in ".[]{}"):
            fix = "use {column} with a plain column name"
            cause = f"bad placeholder {{{name}{'!' if conversion else ''}{spec or ''}}}"
            raise ConfigError(cause, where="data.template", fix=fix)
    return tuple((literal, name) for literal, name, _, _ in parsed)


def read_history(history: object) -> list[dict[str, Any]]:
    """Alpaca's earlier exchanges, ``[[question, answer], ...]``, also written as JSON.

    Raises:
        DataError: if it is anything else.
    """
    if isinstance(history, str) and history.strip().startswith("["):
        try:
            history = parse_json(history)
        except DataError as error:
            fix = "write [[question, answer], ...] as JSON"
            raise DataError(f"`history`: {error.cause}", fix=fix) from error
    if is_blank(history):
        return []
    exchanges = []
    for number, pair in enumerate(history if isinstance(history, list) else [history], start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            cause = f"exchange {number} of `history` is {shown(pair)}"
            raise DataError(cause, fix="write [[question, answer], ...]")
        exchanges.append({"instruction": pair[0], "answer": pair[1]})
    return exchanges


def is_blank(value: object) -> bool:
    """Whether a column holds nothing to read: null, empty or only white space."""
    return value is None or (isinstance(value, str) and not value.strip())


def is_number(value: object) -> bool:
    """Whether a value is a number, which true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_text(value: object, column: str) -> str:
    """A column's value as text; numbers are written out as in their file, null is empty.

    Raises:
        DataError: for lists, objects, booleans, NaN, infinity, and text that no UTF-8 file can
            hold.
    """
    if value is None:
        return ""
    if isinstance(value, float) and not isinstance(value, Number) and not math.isfinite(value):
        word = "NaN" if math.isnan(value) else "infinity"
        raise DataError(f"`{column}` is {word}, not text", fix="write the text, or leave it empty")
    if is_number(value):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"`{column}` is a {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"`{column}` has half a surrogate pair at {error.start + 1}") from error
    return value
