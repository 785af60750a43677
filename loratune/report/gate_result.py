"""What a gate asked and found: as a table, as JSON, and as JUnit's XML for CI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from xml.etree import ElementTree

from loratune.console import printable
from loratune.errors import GateError, raise_together
from loratune.tables import Table


@dataclass(frozen=True)
class Demand:
    """One demand of a gate.

    Attributes:
        name: what is demanded.
        limit: how much of it.
        measured: what there was.
        passed: whether that is enough.
        fix: what to do where it is not.
    """

    name: str
    limit: str
    measured: str
    passed: bool
    fix: str = ""


@dataclass(frozen=True)
class GateResult:
    """Every demand of a gate on a run.

    Attributes:
        run: the run's folder.
        demands: in the order in which they were checked.
        evaluation: the scores that they rest on, as ``evaluation.json`` has them.
    """

    run: str
    demands: Sequence[Demand]
    evaluation: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether the run may go on."""
        return all(demand.passed for demand in self.demands)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"passed": self.passed, **asdict(self)}

    def table(self) -> Table:
        """A line a demand."""
        rows = tuple(
            (d.name, d.limit, d.measured, "passed" if d.passed else "not passed")
            for d in self.demands
        )
        return Table(f"gate of {self.run}", ("", "demanded", "measured", ""), rows)

    def to_junit(self) -> str:
        """One test case a demand, as CI servers read them."""
        failed = sum(not demand.passed for demand in self.demands)
        counts = {"tests": str(len(self.demands)), "failures": str(failed), "errors": "0"}
        suites = ElementTree.Element("testsuites", counts)
        suite = ElementTree.SubElement(suites, "testsuite", {"name": "loratune gate", **counts})
        for demand in self.demands:
            case = ElementTree.SubElement(
                suite, "testcase", classname=printable(self.run), name=printable(demand.name)
            )
            said = printable(f"demanded {demand.limit}, measured {demand.measured}")
            if demand.passed:
                ElementTree.SubElement(case, "system-out").text = said
            else:
                ElementTree.SubElement(case, "failure", message=said)
        ElementTree.indent(suites)
        return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"

    def raise_failures(self) -> None:
        """Raise every demand that is not met at once.

        Raises:
            GateError: exit code 11.
        """
        raise_together(
            GateError(
                f"{demand.name}: demanded {demand.limit}, measured {demand.measured}",
                where=self.run,
                fix=demand.fix,
            )
            for demand in self.demands
            if not demand.passed
        )
