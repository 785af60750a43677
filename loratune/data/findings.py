"""What was found in rows, and how much it matters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from loratune.errors import DataError, raise_together


class Severity(StrEnum):
    """How much a finding matters."""

    error = "error"
    warning = "warning"
    note = "note"


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        name: stable, for programs.
        message: what was found, one sentence.
        where: ``file:line`` of the first case, or a setting.
        fix: what to do about it.
        rows: how many rows are concerned.
    """

    severity: Severity
    name: str
    message: str
    where: str = ""
    fix: str = ""
    rows: int = 0

    @property
    def line(self) -> str:
        """On one line."""
        return f"{self.severity}: " + "; ".join(filter(None, (self.message, self.where, self.fix)))


@dataclass(frozen=True)
class Audit:
    """Everything found.

    Attributes:
        findings: the gravest first.
        longest: ``(file:line, tokens)`` of the longest training rows, as they are trained on.
    """

    findings: tuple[Finding, ...]
    longest: tuple[tuple[str, int], ...]

    def of(self, severity: Severity) -> list[Finding]:
        """The findings of one severity."""
        return [finding for finding in self.findings if finding.severity is severity]

    def raise_errors(self) -> None:
        """Stop if anything found is an error.

        Raises:
            DataError: each of them.
        """
        raise_together(
            DataError(found.message, where=found.where, fix=found.fix)
            for found in self.of(Severity.error)
        )

    def with_further(self, findings: Iterable[Finding]) -> Audit:
        """The same and what was found elsewhere."""
        return replace(self, findings=gravest_first([*findings, *self.findings]))

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)


def gravest_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Findings by severity, otherwise in their order."""
    order = list(Severity)
    return tuple(sorted(findings, key=lambda finding: order.index(finding.severity)))
