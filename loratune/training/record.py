"""What a run writes down while it trains, and what it shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median_high
from typing import Any, Protocol

import torch

from loratune.errors import LoratuneError
from loratune.runs.records import append_line
from loratune.runs.run_dir import RunDir
from loratune.training.display import HealthLine, Silent, make_display


class Tracker(Protocol):
    """Where metrics go besides ``metrics.jsonl``."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the values of one step."""

    def close(self) -> None:
        """Flush and end."""


class Recorder:
    """Writes ``metrics.jsonl`` (reproducible) and ``timings.jsonl`` (not), and shows progress.

    Only the main process's recorder writes or shows anything.  A tracker that fails is left out
    from then on; the training goes on.
    """

    def __init__(
        self, run_dir: RunDir, total: int, trackers: Sequence[Tracker] = (), *, active: bool = True
    ) -> None:
        self._run_dir = run_dir
        self._total = total
        self._trackers = list(trackers)
        self._active = active
        self._seconds: list[float] = []
        self._line = HealthLine()
        self._display = make_display(total) if active else Silent()

    def step(
        self,
        step: int,
        metrics: dict[str, float],
        *,
        seconds: float,
        tokens: int,
        padded: int,
        dead: Sequence[str] = (),
    ) -> None:
        """Record one optimizer step.

        Args:
            step: its number, from 1.
            metrics: what is reproducible.
            seconds: that it took.
            tokens: of its rows, without padding.
            padded: computed: with padding, what rows share once.
            dead: names of modules without a gradient, where it was measured.
        """
        if not self._active:
            return
        self._seconds = [*self._seconds, seconds][-50:]
        rate, fill = tokens / seconds, tokens / max(padded, 1)
        append_line(self._run_dir.metrics, {"step": step, **metrics})
        timing: dict[str, Any] = {
            "step": step,
            "train/step_seconds": seconds,
            "train/tokens_per_second": rate,
            "train/fill_rate": fill,
            "time": time.time(),
            **_memory(),
        }
        if dead:
            timing["health/dead_names"] = list(dead[:3])
        append_line(self._run_dir.timings, timing)
        self._track(step, {**metrics, "train/tokens_per_second": rate, "train/fill_rate": fill})
        left = (self._total - step) * median_high(self._seconds)
        self._line.step(metrics, fill, rate, left)
        self._display.step(step, self._line)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Record an evaluation after ``step``."""
        if not self._active:
            return
        append_line(self._run_dir.metrics, {"step": step, **metrics})
        self._track(step, metrics)
        if "eval/loss" in metrics:
            self._line.evaluation(step, metrics["eval/loss"])
        values = [f"{key} {value:.4g}" for key, value in metrics.items()]
        self._display.note("  ".join([f"step {step}", *values]))

    def note(self, text: str) -> None:
        """Show a sentence without disturbing the progress line."""
        if self._active:
            self._display.note(text)

    def close(self) -> None:
        """End the progress display and the trackers."""
        self._display.close()
        for tracker in list(self._trackers):
            self._guarded(tracker, tracker.close)

    def _track(self, step: int, values: dict[str, float]) -> None:
        for tracker in list(self._trackers):
            self._guarded(tracker, tracker.log, step, values)

    def _guarded(self, tracker: Tracker, action: Callable[..., None], *arguments: Any) -> None:
        """A tracker is a convenience: whatever it raises must not end the training."""
        try:
            action(*arguments)
        except LoratuneError:
            raise
        except Exception as error:
            self._trackers.remove(tracker)
            kind = type(tracker).__name__
            self.note(f"note: the tracker {kind} failed and is left out from here: {error}")


def _memory() -> dict[str, float]:
    if torch.cuda.is_available():
        return {"memory/peak_allocated_bytes": float(torch.cuda.max_memory_allocated())}
    return {"memory/peak_resident_bytes": float(peak_resident_bytes())}


def peak_resident_bytes() -> int:
    """The largest resident set that this program has had.

    Where the kernel tells it (Linux), from the program's own address space: ``ru_maxrss`` begins
    with the size of the process that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
