"""What the suite counted, printed at its end and quoted in docs/reliability.md."""

from __future__ import annotations

from collections import Counter

ORDER = (
    "kills at a write boundary",
    "kills at a random instant",
    "SIGTERM and SIGINT",
    "disk refusals injected",
    "newest checkpoints found unusable after a kill",
    "runs whose final bytes differ from the undisturbed run",
    "steps lost beyond one save interval",
    "leftovers not cleaned",
    "damaged checkpoint files",
    "damages not noticed",
    "changes between save and resume",
    "changes not noticed",
    "resumes compared byte for byte",
    "clean reruns",
    "false alarms",
    "keys mutated",
    "keys without effect",
)


class Tally:
    """Named counts; a zero that was looked for is shown as well."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._seen: set[str] = set()

    def add(self, name: str, number: int = 1) -> None:
        """Count; `number` may be zero, which says that the thing was looked for."""
        assert name in ORDER, name
        self._counts[name] += number
        self._seen.add(name)

    def counts(self) -> dict[str, int]:
        """Name to number."""
        return {name: self._counts[name] for name in self._seen}

    def lines(self) -> list[str]:
        """One line per name that was counted."""
        return [f"{self._counts[name]:6d}  {name}" for name in ORDER if name in self._seen]


TALLY = Tally()
