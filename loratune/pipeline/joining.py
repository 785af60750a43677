"""One process of a run of several: how it joins the others, and what it says when one is lost."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from loratune.config.schema import LaunchConfig, RunConfig
from loratune.errors import ConfigError, Interrupted, LoratuneError, Preempted, TrainingError
from loratune.runs import processes
from loratune.runs.agreement import DisagreementError, check_start
from loratune.runs.background import in_background
from loratune.runs.meeting import meet
from loratune.runs.notices import LostProcessError, Notices, RelayedError, named_ranks
from loratune.runs.run_dir import AUTO

_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL error")
_SILENT = ("Timed out waiting", "Application timeout", "timed out", "timeout")
ANSWERS_WITHIN = 7.0
"""Seconds in which a store that has been reached answers; one not yet there is waited for."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def join(config: RunConfig) -> None:
    """Be one process of the run, under ``launch`` or under torchrun.

    Raises:
        LoratuneError: what stopped the run, in this process or in another.
    """
    from loratune.pipeline.run import run

    _end_with_agent()
    _require_resumable(config)
    with _process_group(config.launch) as notices, _told(notices, config.launch):
        config = replace(config, launch=replace(config.launch, nproc=processes.world_size()))
        check_start(config)
        run(config)


def _end_with_agent() -> None:
    """If the launcher is killed, save and end as on preemption, rather than go on unwatched."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def _require_resumable(config: RunConfig) -> None:
    """Stop before the first start if torchrun's next one could not go on from it.

    Raises:
        ConfigError: ``--max-restarts`` without a folder to go on in.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and (config.out is None or config.resume is None):
        raise ConfigError(
            "a run that torchrun may restart must know its folder and go on in it",
            where=f"--max-restarts {restarts}",
            fix=f"add out=DIR resume={AUTO}",
        )


@contextmanager
def _process_group(settings: LaunchConfig) -> Iterator[Notices]:
    """The connection to all other processes, from the variables that torchrun sets.

    Raises:
        LoratuneError: if they do not come together within ``launch.timeout``.
    """
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    wait = timedelta(seconds=settings.timeout)
    try:
        store, rank, world = _reach_store(wait)
        meeting = PrefixStore("loratune/meeting", store)
        own = PrefixStore(f"loratune/{meet(meeting, rank, world, settings.timeout)}", store)
        backend = "nccl" if has_cuda else "gloo"
        dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=wait)
    except (ValueError, RuntimeError) as error:
        raise _not_joined(error, settings.timeout) from error
    notices = Notices(PrefixStore("notices", own), rank, world)
    try:
        yield notices
    finally:
        dist.destroy_process_group()
        notices.wait_until_heard()


def _reach_store(wait: timedelta) -> tuple[Store, int, int]:
    """The store where the processes meet, the rank of this one, and how many there are.

    torch waits without end where its address answers and it is not the store that does.

    Raises:
        ConfigError: if it is another program.
    """
    store: Future[tuple[Store, int, int]]
    store = in_background(lambda: next(rendezvous("env://", timeout=wait)))
    try:
        return store.result(ANSWERS_WITHIN)
    except TimeoutError:
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    while not (is_connected := _connects(host, int(port))) and not store.done():
        time.sleep(1)
    try:
        return store.result(ANSWERS_WITHIN if is_connected else None)
    except TimeoutError:
        raise ConfigError(
            f"rank {os.environ['RANK']}: what answers at {host}:{port} is not this run, the port "
            "is in use",
            where="MASTER_PORT",
            fix="choose another port, the same for all processes",
        ) from None


def _connects(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def _not_joined(error: Exception, timeout: int) -> LoratuneError:
    rank, text = os.environ["RANK"], str(error)
    meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if isinstance(error, ValueError):
        return ConfigError(text.splitlines()[0], where=f"rank {rank}", fix="start with torchrun")
    if "EADDRINUSE" in text:
        return ConfigError(
            f"rank {rank} cannot listen on {meeting}: the port is in use",
            where="MASTER_PORT",
            fix="choose another port, the same for all processes",
        )
    if "connectFullMesh" in text:
        return TrainingError(
            f"rank {rank} met the others at {meeting} and then reached none of them",
            where="network interface",
            fix="name the one that the machines share: GLOO_SOCKET_IFNAME=eth0",
        )
    return TrainingError(
        f"rank {rank} did not come together with the other processes within {timeout} s",
        where=meeting,
        fix="start all of them, see that they reach this address, or raise launch.timeout",
    )


@contextmanager
def _told(notices: Notices, settings: LaunchConfig) -> Iterator[None]:
    """An error of this process reaches the others, and theirs is told here instead of its trace.

    Raises:
        LoratuneError: the block's own, with this rank; another process's; or which one was lost.
    """
    try:
        yield
    except LoratuneError as error:
        _end_undisturbed()
        if not _is_said_by_all(error):
            _name_rank(error, notices.rank)
            notices.leave(error)
        raise
    except RuntimeError as error:
        is_silent = any(sign in str(error) for sign in _SILENT)
        if not is_silent and not any(sign in str(error) for sign in _LOST):
            raise
        _end_undisturbed()
        reason, silent = notices.ask()
        if reason is not None:
            raise RelayedError(reason) from error
        raise _lost(silent, notices, settings.timeout if is_silent else None) from error


def _end_undisturbed() -> None:
    """From now on the launcher's SIGTERM does not keep this process from saying why it ends."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _is_said_by_all(error: LoratuneError) -> bool:
    parts = getattr(error, "errors", [error])
    return all(isinstance(part, DisagreementError | RelayedError) for part in parts)


def _name_rank(error: LoratuneError, rank: int) -> None:
    if isinstance(error, Preempted | Interrupted):
        return  # all of them stop together
    for one in getattr(error, "errors", [error]):
        one.where = f"{one.where}; rank {rank}".lstrip("; ")


def _lost(silent: list[int], notices: Notices, timeout: int | None) -> LostProcessError:
    if timeout is None:
        cause = "another process of this run has ended"
        cause += f": {named_ranks(silent)}, without a word" if silent else ""
        return LostProcessError(cause, where=f"rank {notices.rank}")
    cause = f"{named_ranks(silent or notices.others)} did not answer for {timeout} s"
    return LostProcessError(
        cause,
        where=f"rank {notices.rank}, launch.timeout",
        fix="a stopped process or a broken network; the checkpoints are intact: resume=auto",
    )
