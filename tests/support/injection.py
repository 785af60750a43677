"""Faults at the n-th call of a function, installed in a case's own process before it starts.

A fault is `ACTION@TARGET:N`: for instance `kill@os.replace:3` or `nan@loss:5`; with `N+`, also at
every later call.  `TARGET` is `module.attribute`, or `write` for every place where bytes or names
reach the disk, counted together.  `ACTION` is one of

    kill    SIGKILL to this process before the call
    tear    make the call, cut the file it wrote in half, then SIGKILL
    term    SIGTERM to this process before the call, as a scheduler would send
    int     SIGINT likewise
    int2    SIGINT twice
    enospc  raise ENOSPC instead of the call
    efbig   raise EFBIG likewise
    nan     return the call's tensor result filled with NaN
    inf     likewise with infinity
    zero    return 0 instead of the call
    scale   return one and a half times the call's tensor result, or its last part; a constructor's
            module has its buffers scaled
    empty   return an empty list instead of the call
    old     return the version 0.0.1 instead of the call's
    late    return an hour less than the call's time
    closepipe
            make stdout a pipe whose reader has gone
    memory, memoryerror
            ask for more memory than there can be, of torch or of Python
    nangrad
            make the gradient that flows into the call's result NaN
    nanparameter, nudge
            make one trained number NaN, or a little larger, after the call; where the call
            returns tensors by name, one of these that has any numbers here
    freeze, detach, idle
            after the call: nothing trains; the first block's output carries no gradient; the
            optimizer does nothing
    raise   raise RuntimeError, a bug in a late stage
    leak    raise RuntimeError with the value of HF_TOKEN in its message and in a local variable
    sleep   wait a tenth of a second before every call, so that others can look
    count   append the target's name to the file `calls` at every call
    audit, deny
            append every audit event that matches the expression TARGET to the file `calls`;
            deny also refuses it

With several processes a fault acts in the process named by `RANK=r` in its text: `kill@x:2#1`.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = (
    "os.replace",
    "os.rename",
    "os.fsync",
    "os.mkdir",
    "os.unlink",
    "os.rmdir",
    "safetensors.torch.save_file",
)


def install(fault: str, folder: Path) -> None:
    """Wrap the fault's target in this process."""
    fault, _, rank = fault.partition("#")
    if rank and os.environ.get("RANK", "0") != rank:
        return
    action, _, rest = fault.partition("@")
    if action in ("audit", "deny"):
        return watch(action, re.compile(rest), folder)
    target, _, number = rest.partition(":")
    wrapper = Wrapper(action, int(number.rstrip("+") or 0), number.endswith("+"), folder)
    for name in WRITES if target == "write" else (target,):
        wrapper.wrap(name)


def watch(action: str, pattern: re.Pattern[str], folder: Path) -> None:
    """Note, or refuse, audit events of this process from now on."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        named = f"{event} {arguments[0]}" if event == "open" else event
        if not pattern.fullmatch(named):
            return
        with open(folder / "calls", "a", encoding="utf-8") as file:
            file.write(f"{event} {arguments}\n")
        if action == "deny":
            raise OSError(f"{event} is not allowed here")

    sys.addaudithook(hook)


class Wrapper:
    """Counts calls over all its targets and acts at the chosen one, or from it on."""

    def __init__(self, action: str, number: int, later: bool, folder: Path) -> None:
        self.action, self.number, self.later, self.folder = action, number, later, folder
        self.calls = 0

    def wrap(self, name: str) -> None:
        """Put this wrapper around `module.attribute`, wherever it has been imported by name."""
        holder, attribute = _resolve(name)
        original = getattr(holder, attribute)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            return self.call(name, original, arguments, options)

        setattr(holder, attribute, wrapped)

    def call(self, name: str, original: Callable[..., Any], arguments: Any, options: Any) -> Any:
        """One call of a target."""
        self.calls += 1
        if self.action == "count":
            with open(self.folder / "calls", "a", encoding="utf-8") as file:
                file.write(name + "\n")
        if self.action == "sleep":
            time.sleep(0.1)
        if self.calls != self.number and not (self.later and self.calls > self.number):
            return original(*arguments, **options)
        return self.act(original, arguments, options)

    def act(self, original: Callable[..., Any], arguments: Any, options: Any) -> Any:
        """The chosen call."""
        own, action = os.getpid(), self.action
        if action == "kill":
            os.kill(own, signal.SIGKILL)
        if action == "tear":
            result = original(*arguments, **options)
            path = next(a for a in arguments if isinstance(a, (str, Path)))
            with open(path, "r+b") as file:
                file.truncate(Path(path).stat().st_size // 2)
            os.kill(own, signal.SIGKILL)
            return result
        if action in ("term", "int", "int2"):
            number = signal.SIGTERM if action == "term" else signal.SIGINT
            for _ in range(2 if action == "int2" else 1):
                os.kill(own, number)
                time.sleep(0.01)
        if action in ("enospc", "efbig"):
            code = errno.ENOSPC if action == "enospc" else errno.EFBIG
            raise OSError(code, os.strerror(code))
        if action == "raise":
            raise RuntimeError("injected")
        if action == "leak":
            token = os.environ["HF_TOKEN"]
            raise RuntimeError(f"cannot sign in with {token}")
        if action in INSTEAD:
            return INSTEAD[action]
        if action == "closepipe":
            reader, writer = os.pipe()
            os.dup2(writer, 1)
            os.close(reader)
        if action == "memory":
            import torch

            torch.empty(1 << 50, dtype=torch.uint8)
        if action == "memoryerror":
            raise MemoryError
        result = original(*arguments, **options)
        if action == "scale" and result is None:
            _scale_buffers(arguments[0])
            return None
        return AFTERWARDS.get(action, lambda unchanged: unchanged)(result)


def _scale(result: Any) -> Any:
    return (*result[:-1], result[-1] * 1.5) if isinstance(result, tuple) else result * 1.5


def _scale_buffers(module: Any) -> None:
    for buffer in module.buffers():
        buffer.mul_(1.5)


def _not_finite(value: float) -> Callable[[Any], Any]:
    def spoiled(result: Any) -> Any:
        import torch

        return torch.full_like(result, value) + 0 * result

    return spoiled


def _spoil_gradient(loss: Any) -> Any:
    loss.total.register_hook(lambda gradient: gradient * float("nan"))
    return loss


def _spoil_parameter(result: Any) -> Any:
    import gc

    import torch

    for parameter in (o for o in gc.get_objects() if isinstance(o, torch.nn.Parameter)):
        if parameter.requires_grad:
            parameter.data.view(-1)[0] = float("nan")
            break
    return result


def _nudge(result: Any) -> Any:
    import gc

    import torch

    if isinstance(result, dict):
        from loratune.runs.sharded import own_part

        next(part for part in map(own_part, result.values()) if part.numel()).view(-1)[0] += 1e-3
        return result
    for parameter in (o for o in gc.get_objects() if isinstance(o, torch.nn.Parameter)):
        if parameter.requires_grad:
            parameter.data.view(-1)[0] += 1e-3
            break
    return result


def _freeze(wrapped: Any) -> Any:
    wrapped.model.requires_grad_(False)
    return wrapped


def _detach(wrapped: Any) -> Any:
    block = wrapped.model.model.decoder.layers[0]
    block.register_forward_hook(
        lambda module, inputs, output: (
            (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()
        )
    )
    return wrapped


def _idle(optimizer: Any) -> Any:
    optimizer.step = lambda: None
    return optimizer


INSTEAD: dict[str, Any] = {"zero": 0, "empty": [], "old": "0.0.1"}
"""What these actions return instead of the call."""
AFTERWARDS: dict[str, Callable[[Any], Any]] = {
    "nan": _not_finite(float("nan")),
    "inf": _not_finite(float("inf")),
    "late": lambda seconds: seconds - 3600,
    "scale": _scale,
    "nangrad": _spoil_gradient,
    "nanparameter": _spoil_parameter,
    "nudge": _nudge,
    "freeze": _freeze,
    "detach": _detach,
    "idle": _idle,
}
"""What the later actions do with a call's result."""


def _resolve(name: str) -> tuple[Any, str]:
    """The object that holds the attribute, importing as much of the dotted name as is a module."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            holder: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:-1]:
            holder = getattr(holder, part)
        return holder, parts[-1]
    raise ValueError(name)
