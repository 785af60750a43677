"""Progress for people: one live line on a terminal, some plain lines in pipes and CI."""

from __future__ import annotations

from statistics import fmean

from loratune.console import console, is_interactive, printable, say
from loratune.units import clock, filled

_PLAIN_LINES = 20
_PLAIN_WIDTH = 140
_NARROW = 100
"""Columns below which the live line does without a bar."""
_TREND = 20
"""Steps on either side of the trend."""
_STEADY = 0.01
"""Relative change of the loss below which there is no trend."""


class HealthLine:
    """Collects what a training reports; in a short line the least important parts give way."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._latest: dict[str, float] = {}
        self._fills: list[float] = []
        self._best: tuple[float, int] | None = None
        self._rate = self._left = 0.0

    def step(self, metrics: dict[str, float], fill: float, rate: float, left: float) -> None:
        """Take in one recorded step.

        Args:
            metrics: as in ``metrics.jsonl``.
            fill: tokens of the rows over tokens computed; above 1 where rows share some.
            rate: tokens per second.
            left: seconds until the end.
        """
        self._losses = [*self._losses, metrics["train/loss"]][-2 * _TREND :]
        self._fills = [*self._fills, fill][-_TREND:]
        self._latest |= metrics
        self._rate, self._left = rate, left

    def evaluation(self, step: int, loss: float) -> None:
        """Take in an evaluation after ``step``."""
        if self._best is None or loss < self._best[0]:
            self._best = (loss, step)

    def text(self, width: int) -> str:
        """The line, in at most ``width`` characters as far as its first part allows."""
        parts = self._parts()
        while len(parts) > 1 and len("  ".join(text for _, text in parts)) > width:
            parts.remove(max(parts))
        return "  ".join(text for _, text in parts)

    def _parts(self) -> list[tuple[int, str]]:
        """Rank (0 matters most) and text, in the order shown."""
        latest = self._latest
        parts = [(0, f"loss {latest['train/loss']:.4f}{self._trend()}")]
        if self._best is not None:
            parts.append((2, f"best {self._best[0]:.4f}@{self._best[1]}"))
        if latest.get("health/dead_modules"):
            parts.append((1, f"dead modules {latest['health/dead_modules']:.0f}"))
        parts.append((4, f"lr {latest['train/lr']:.3g}"))
        for rank, label, key in (
            (5, "|g|", "train/grad_norm"),
            (6, "|Δ|/|θ|", "health/update_ratio"),
            (7, "|B|/|A|", "health/norm_ratio"),
        ):
            if key in latest:
                parts.append((rank, f"{label} {latest[key]:.2g}"))
        parts.append((8, filled(fmean(self._fills))))
        parts.append((3, f"{self._rate:,.0f} tokens/s"))
        parts.append((1, f"{clock(self._left)} left"))
        return parts

    def _trend(self) -> str:
        """How the mean of the newest steps compares with as many before."""
        count = min(_TREND, len(self._losses) // 2)
        if count < 3:
            return ""
        before, now = fmean(self._losses[-2 * count : -count]), fmean(self._losses[-count:])
        change = (now - before) / abs(before) if before else 0.0
        if abs(change) < _STEADY:
            return " →"
        return f" {'↑' if change > 0 else '↓'}{abs(change):.0%}"


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
