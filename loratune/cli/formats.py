"""How a command shows its result."""

from __future__ import annotations

from enum import StrEnum


class TableOrJson(StrEnum):
    """For people or for programs."""

    table = "table"
    json = "json"


class TableFormat(StrEnum):
    """Of commands whose result is tables."""

    table = "table"
    md = "md"
    csv = "csv"
    json = "json"
