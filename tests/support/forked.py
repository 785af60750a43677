"""One command line per forked child: torch is imported once, yet every case is a process.

A child has its own exit code, standard streams, working folder and environment, and can be killed.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from support.preload import preload

WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Outcome:
    """What a child came to."""

    code: int
    out: str
    err: str
    seconds: float
    peak_bytes: int

    @property
    def last(self) -> str:
        """The last line of standard error."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    @property
    def errors(self) -> list[str]:
        """Every ``error[CODE] ...`` line."""
        return [line for line in self.err.splitlines() if line.startswith("error[")]

    @property
    def text(self) -> str:
        """Both streams."""
        return self.out + self.err


def run_cli(
    *words: str,
    cwd: Path,
    env: Mapping[str, str | None] | None = None,
    before: Callable[[], None] | None = None,
    seconds: float = WAIT_SECONDS,
) -> Outcome:
    """Run ``loratune *words`` in a forked child.

    Args:
        words: the words after ``loratune``.
        cwd: the child's working folder.
        env: environment variables to set, or to remove where the value is None.
        before: called in the child first, to inject a fault.
        seconds: the child is killed after this time (exit code -9).
    """

    def task() -> None:
        from loratune.cli import main

        sys.argv = ["loratune", *words]
        main()

    return run_forked(task, cwd=cwd, env=env, before=before, seconds=seconds)


def run_forked(
    task: Callable[[], None],
    *,
    cwd: Path,
    env: Mapping[str, str | None] | None = None,
    before: Callable[[], None] | None = None,
    seconds: float = WAIT_SECONDS,
) -> Outcome:
    """Run ``task`` in a forked child (see ``run_cli``); an exception is a traceback and code 1."""
    preload()
    streams = [cwd / f".stream-{time.monotonic_ns()}-{name}" for name in ("out", "err")]
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        _child(task, cwd, dict(env or {}), before, streams)
    status, usage = _wait(child, seconds)
    elapsed = time.perf_counter() - started
    out, err = (path.read_text(encoding="utf-8", errors="replace") for path in streams)
    for path in streams:
        path.unlink()
    return Outcome(os.waitstatus_to_exitcode(status), out, err, elapsed, usage.ru_maxrss * 1024)


def _wait(child: int, seconds: float) -> tuple[int, resource.struct_rusage]:
    deadline = time.monotonic() + seconds
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage
        time.sleep(0.005)


def _child(
    task: Callable[[], None],
    cwd: Path,
    env: dict[str, str | None],
    before: Callable[[], None] | None,
    streams: list[Path],
) -> None:
    code = 1
    try:
        _redirect(streams)
        os.chdir(cwd)
        for name, value in env.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _forget_parent()
        if before is not None:
            before()
        task()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _redirect(streams: list[Path]) -> None:
    for number, path in enumerate(streams, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  lives as long as the child
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def _forget_parent() -> None:
    """What earlier tests left in this process must not reach the command."""
    import warnings

    import torch
    from hydra.core.global_hydra import GlobalHydra

    from loratune.console import console

    # A fork replaces torch's thread pool at its next use.  Here, that use is this line: left to the
    # threads that load a model's tensors, one of them may meet the pool while another swaps it.
    torch.set_num_threads(1)
    GlobalHydra.instance().clear()
    console.cache_clear()
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
