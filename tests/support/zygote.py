"""A process that has imported everything once and forks a fresh `loratune` for every case.

It computes nothing and has no threads, so that its forks are sound, whatever the tests have done.
Reads one JSON object a line from stdin: where the case's files go, the words after `loratune`, and
the fault to inject.  A monitor process waits for each case and writes its exit status to `status`;
cases therefore run at the same time where a test asks for that.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import resource
import signal
import sys
from pathlib import Path
from typing import Any


def warm() -> None:
    """Import what a run imports, so that a forked case starts at once; compute nothing."""
    import torch.distributed  # noqa: F401  one thread by OMP_NUM_THREADS: pools are not forked
    import transformers.models.opt.modeling_opt  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import loratune
    from loratune.errors import ConfigError

    for module in pkgutil.walk_packages(loratune.__path__, "loratune."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ConfigError):  # it needs an extra that is not here
                importlib.import_module(module.name)
    gc.freeze()  # the cases share these objects' memory


def serve() -> None:
    """Fork a monitor per request until stdin ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # monitors are reaped by the kernel
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            monitor(request)


def monitor(request: dict[str, Any]) -> None:
    """Fork the case, write its process id, wait, write its status, end."""
    folder = Path(request["folder"])
    case = os.fork()
    if case == 0:
        run_case(request)
    _write(folder / "pid", str(case))
    _, status = os.waitpid(case, 0)
    _write(folder / "status", str(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(text)
    temporary.replace(path)


def run_case(request: dict[str, Any]) -> None:
    """Be `loratune ...` until the process ends."""
    from loratune.training.record import peak_resident_bytes

    folder = Path(request["folder"])
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(folder / "stdout", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    err = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    # Opened and looked up before faults are: what the tests write is never refused or counted.
    grown, write = os.open(folder / "grown", os.O_WRONLY | os.O_CREAT, 0o644), os.write
    for target, source in enumerate((null, out, err)):
        os.dup2(source, target)
    os.setsid()
    # As in a terminal: who runs the tests in the background leaves SIGINT ignored to all of them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["limits"]:
        for name, value in request["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself does at its start
    code = 1
    at_first = peak_resident_bytes()
    try:
        import injection
        import torch

        from loratune.cli import main

        # A fork replaces torch's thread pool at its next use.  Here, that use is this line: left to
        # the threads that load a model's tensors, one may meet the pool while another swaps it.
        torch.set_num_threads(1)
        for fault in request["faults"]:
            injection.install(fault, folder)
        sys.argv = ["loratune", *request["words"]]
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        write(grown, str(peak_resident_bytes() - at_first).encode())
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    warm()
    serve()
