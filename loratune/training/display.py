"""Progress for people: one live line on a terminal, some plain lines in pipes and CI."""

from __future__ import annotations

from loratune.console import console, is_interactive, printable, say
from loratune.training.health_line import HealthLine

_PLAIN_LINES = 20
_PLAIN_WIDTH = 140
_NARROW = 100
"""Columns below which the live line does without a bar."""


class Silent:
    """Shows nothing: every process but the first."""

    def step(self, step: int, line: HealthLine) -> None:
        """Show where the training stands."""

    def note(self, text: str) -> None:
        """Show a sentence that stays."""

    def close(self) -> None:
        """End the display."""


class PlainLines(Silent):
    """About twenty lines over the whole run."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._every = max(1, total // _PLAIN_LINES)

    def step(self, step: int, line: HealthLine) -> None:
        if step % self._every == 0 or step in (1, self._total):
            start = f"step {step}/{self._total}  "
            say(start + line.text(_PLAIN_WIDTH - len(start)))

    def note(self, text: str) -> None:
        say(text)


class LiveLine(Silent):
    """One line that is drawn anew: bar, step, and the health line in what is left of the width."""

    def __init__(self, total: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            TextColumn,
        )

        columns: list[ProgressColumn | str] = [TextColumn("train", markup=False)]
        taken = len("train ") + 2 * len(str(total)) + 3
        if console().width >= _NARROW:
            columns.append(BarColumn(bar_width=16))
            taken += 17
        columns += [MofNCompleteColumn(), TextColumn("{task.fields[text]}", markup=False)]
        self._taken = taken
        self._progress = Progress(*columns, console=console())
        self._task = self._progress.add_task("train", total=total, text="")
        self._progress.start()

    def step(self, step: int, line: HealthLine) -> None:
        text = line.text(console().width - self._taken)
        self._progress.update(self._task, completed=step, text=text)

    def note(self, text: str) -> None:
        self._progress.console.print(printable(text), soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def make_display(total: int) -> Silent:
    """What suits the output."""
    return LiveLine(total) if is_interactive() else PlainLines(total)
