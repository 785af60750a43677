"""What a run writes down while it trains, and what it shows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from loratune.console import console, is_interactive, say
from loratune.run_dir import RunDir


class Tracker(Protocol):
    """Where metrics go besides ``metrics.jsonl``."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the values of one step."""

    def close(self) -> None:
        """Flush and end."""


class Recorder:
    """Writes ``metrics.jsonl`` (reproducible) and ``timings.jsonl`` (not), and shows progress.

    Only the main process's recorder writes or shows anything.
    """

    def __init__(
        self, run_dir: RunDir, total: int, trackers: Sequence[Tracker] = (), *, active: bool = True
    ) -> None:
        self._run_dir = run_dir
        self._total = total
        self._trackers = trackers
        self._active = active
        self._started = time.perf_counter()
        self._step_started = self._started
        self._seconds: list[float] = []
        self._display = _display(total) if active else _Silent()

    def begin_step(self) -> None:
        """Start the clock of a step."""
        self._step_started = time.perf_counter()

    def step(self, step: int, metrics: dict[str, float], *, tokens: int, padded: int) -> None:
        """Record one optimizer step (``step`` counts from 1)."""
        if not self._active:
            return
        seconds = time.perf_counter() - self._step_started
        self._seconds.append(seconds)
        self._run_dir.append(self._run_dir.metrics, {"step": step, **metrics})
        timing = {
            "step": step,
            "train/step_seconds": seconds,
            "train/tokens_per_second": tokens / seconds,
            "train/fill_rate": tokens / max(padded, 1),
            "time": time.time(),
            **_memory(),
        }
        self._run_dir.append(self._run_dir.timings, timing)
        for tracker in self._trackers:
            tracker.log(step, {**metrics, "train/tokens_per_second": tokens / seconds})
        recent = sorted(self._seconds[-50:])
        left = (self._total - step) * recent[len(recent) // 2]
        self._display.step(step, metrics, tokens / seconds, left)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Record an evaluation after ``step``."""
        if not self._active:
            return
        self._run_dir.append(self._run_dir.metrics, {"step": step, **metrics})
        for tracker in self._trackers:
            tracker.log(step, metrics)
        self._display.note(_pairs(f"step {step}", metrics))

    def note(self, text: str) -> None:
        """Show a sentence without disturbing the progress line."""
        if self._active:
            self._display.note(text)

    def close(self) -> None:
        """End the progress display and the trackers."""
        self._display.close()
        for tracker in self._trackers:
            tracker.close()


def _memory() -> dict[str, float]:
    if torch.cuda.is_available():
        return {"memory/peak_allocated_bytes": float(torch.cuda.max_memory_allocated())}
    import resource

    return {"memory/peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}


def _pairs(start: str, metrics: dict[str, float]) -> str:
    return "  ".join([start, *(f"{key} {value:.4g}" for key, value in metrics.items())])


class _Silent:
    def step(self, step: int, metrics: dict[str, float], rate: float, left: float) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class _Lines(_Silent):
    """Plain lines, about twenty over the whole run, for pipes and CI."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._every = max(1, total // 20)

    def step(self, step: int, metrics: dict[str, float], rate: float, left: float) -> None:
        if step % self._every == 0 or step in (1, self._total):
            say(
                f"step {step}/{self._total}  loss {metrics['train/loss']:.4f}  "
                f"lr {metrics['train/lr']:.3g}  {rate:,.0f} tokens/s  {_duration(left)} left"
            )

    def note(self, text: str) -> None:
        say(text)


class _Live(_Silent):
    """One live line on a terminal: bar, step, loss, lr, tokens/s, time left."""

    def __init__(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("train", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=console(),
        )
        self._task = self._progress.add_task("train", total=total, text="")
        self._progress.start()

    def step(self, step: int, metrics: dict[str, float], rate: float, left: float) -> None:
        text = (
            f"loss {metrics['train/loss']:.4f}  lr {metrics['train/lr']:.3g}  "
            f"{rate:,.0f} tokens/s  {_duration(left)} left"
        )
        self._progress.update(self._task, completed=step, text=text)

    def note(self, text: str) -> None:
        self._progress.console.print(text)

    def close(self) -> None:
        self._progress.stop()


def _display(total: int) -> _Silent:
    return _Live(total) if is_interactive() else _Lines(total)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def summary_of(metrics: dict[str, Any]) -> str:
    """Metrics on one line."""
    return _pairs("", metrics).strip()
