"""Two machines on one: network namespaces with host names of their own and a cable between them.

Each is a namespace with an `eth0`, a host name (`loratune1`, `loratune2`) and a hosts file, as
`ip netns` mounts them; the disk is the one that both share.  Needs root and Linux.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PREFIX = "loratune"
NUMBERS = (1, 2)
PORT = 29500
PATIENCE = 240.0
"""Seconds after which an agent that has not ended is a hang."""


def why_not() -> str:
    """Why there can be no second machine here, or an empty string."""
    if shutil.which("ip") is None:
        return "there is no `ip` command"
    tried = ["ip", "netns", "add", f"{PREFIX}-try"]
    done = subprocess.run(tried, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"`ip netns` is not permitted here: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", f"{PREFIX}-try"], check=True)
    return ""


def host(number: int) -> str:
    """A machine's name."""
    return f"{PREFIX}{number}"


def _address(number: int) -> str:
    return f"10.77.0.{number}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass(frozen=True)
class Agent:
    """A command that runs on one of the machines."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        """What it and its workers have printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def workers(self) -> list[int]:
        """Process ids of the training processes that it has started, in order of rank."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                environment = (folder / "environ").read_bytes().split(b"\0")
            except (OSError, ValueError, IndexError):
                continue
            if parent == self.process.pid and any(v.startswith(b"RANK=") for v in environment):
                found.append(int(folder.name))
        return sorted(found)

    def kill(self) -> None:
        """SIGKILL to the agent alone: its workers are left to themselves."""
        self.process.kill()

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit code; one that hangs is killed with all that it started."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise


class Machines:
    """Both machines, and the agents that were started on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.agents = folder, list[Agent]()
        self.python = [sys.executable, "-m", "torch.distributed.run"]

    def torchrun(
        self, number: int, options: Sequence[str], words: Sequence[str], **environment: str
    ) -> Agent:
        """Start torchrun with `loratune WORDS` on a machine."""
        command = [*self.python, "--nnodes", "2"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host(1)}:{PORT}", *options]
        return self.start(number, [*command, "-m", "loratune", *words], **environment)

    def start(self, number: int, command: Sequence[str], **environment: str) -> Agent:
        """Start a command on a machine, in a process group of its own."""
        log = self.folder / f"{host(number)}-{len(self.agents)}.log"
        inside = ["ip", "netns", "exec", host(number), "unshare", "--uts", "sh", "-c"]
        inside += ['hostname "$0"; exec "$@"', host(number), *command]
        with log.open("wb") as file:
            process = subprocess.Popen(
                inside,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                start_new_session=True,
            )
        agent = Agent(number, process, log)
        self.agents.append(agent)
        return agent

    def wait_until(self, condition: Callable[[], bool], timeout: float = PATIENCE) -> None:
        """Wait for something to become true while an agent runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            texts = [agent.text for agent in self.agents]
            assert any(agent.process.poll() is None for agent in self.agents), texts
            assert time.monotonic() < deadline, texts
            time.sleep(0.1)

    def give_up_sooner(self) -> None:
        """Let TCP give up a silent machine within seconds instead of a quarter of an hour."""
        for number in NUMBERS:
            words = ["netns", "exec", host(number), "sh", "-c"]
            _ip(*words, "echo 5 >/proc/sys/net/ipv4/tcp_retries2")

    def cut(self) -> None:
        """Pull the cable."""
        _ip("-n", host(2), "link", "set", "eth0", "down")

    def mend(self) -> None:
        """Put the cable back."""
        _ip("-n", host(2), "link", "set", "eth0", "up")


@contextlib.contextmanager
def two_machines(folder: Path) -> Iterator[Machines]:
    """Two machines, gone again afterwards with all that runs on them."""
    machines = Machines(folder)
    try:
        for number in NUMBERS:
            _ip("netns", "add", host(number))
            own = Path("/etc/netns") / host(number)
            own.mkdir(parents=True, exist_ok=True)
            names = "".join(f"{_address(n)} {host(n)}\n" for n in NUMBERS)
            (own / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            _ip("-n", host(number), "link", "set", "lo", "up")
        ends = [["eth0", "netns", host(number)] for number in NUMBERS]
        _ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for number in NUMBERS:
            _ip("-n", host(number), "addr", "add", f"{_address(number)}/24", "dev", "eth0")
            _ip("-n", host(number), "link", "set", "eth0", "up")
        yield machines
    finally:
        for agent in machines.agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.process.pid, signal.SIGKILL)
            agent.process.wait(30)
        for number in NUMBERS:
            _end_all(number)
            subprocess.run(["ip", "netns", "del", host(number)], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns") / host(number), ignore_errors=True)


def _end_all(number: int) -> None:
    """Kill what still runs in a namespace: workers have process groups of their own."""
    command = ["ip", "netns", "pids", host(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for pid in done.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
