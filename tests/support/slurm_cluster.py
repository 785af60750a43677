"""A SLURM of two nodes on this machine: started for a test module, used, and stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NODES = ("127.0.0.1", "127.0.0.2")
"""Both are this machine; as addresses they are names that resolve."""
PATIENCE = 600.0
"""Seconds after which a job that has not got anywhere hangs."""
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
# A job that is requeued may start again when its credential has run out.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes={all} PriorityTier=1 Default=YES
PartitionName=grace Nodes={all} PriorityTier=1 GraceTime=15
PartitionName=urgent Nodes={all} PriorityTier=9
"""


def why_not() -> str:
    """Why no cluster can be started here; empty if one can."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "srun") if not _program(name)]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "SLURM's daemons are started by root here"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class SlurmCluster:
    """A running cluster of two nodes with one processor each.

    Partitions: `main`; `grace`, whose jobs a preemption tells 15 seconds beforehand; `urgent`,
    whose jobs preempt those of the others.

    Args:
        folder: for the daemons' files, its path short enough for a socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._commands: list[subprocess.Popen[str]] = []
        self._write_files()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, [_package(), os.getenv("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
        }

    def _write_files(self) -> None:
        (self.folder / "state").mkdir()
        (self.folder / "bin").mkdir()
        loratune = self.folder / "bin" / "loratune"
        loratune.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m loratune "$@"\n')
        loratune.chmod(0o755)
        host, ports = socket.gethostname().split(".")[0], _free_ports(len(NODES) + 1)
        nodes = [
            f"NodeName={name} NodeAddr={name} NodeHostname={host} Port={port} CPUs=1"
            for name, port in zip(NODES, ports, strict=False)
        ]
        text = CONF.format(
            folder=self.folder, host=host, port=ports[-1],
            nodes="\n".join(nodes), all=",".join(NODES),
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        at = self.folder
        munge = [f"--{name}-file={at}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={at}/munge.socket", *munge)
        wait_until(lambda: (at / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        wait_until(
            lambda: self.ask("sinfo", "-h", "-p", "main", "-o", "%D %T") == "2 idle", "sinfo"
        )

    def _daemon(self, name: str, *words: str) -> None:
        program = _program(name)
        assert program is not None
        with (self.folder / f"{name}.{len(self._daemons)}.out").open("wb") as log:
            daemon = subprocess.Popen(
                [program, *words], stdout=log, stderr=log, env=self.environment, cwd=self.folder
            )
        self._daemons.append(daemon)

    def stop(self) -> None:
        """Cancel all jobs and stop the daemons, the last one first."""
        for command in self._commands:
            command.kill()
        self.ask("scancel", "--user=root", check=False)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self.ask("squeue", "-h", check=False), "scancel", 60)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(
        self, *words: str, cwd: Path, timeout: float = PATIENCE
    ) -> subprocess.CompletedProcess[str]:
        """A command with this cluster's SLURM, to its end."""
        return subprocess.run(
            words, env=self.environment, cwd=cwd, timeout=timeout,
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def start_command(self, *words: str, cwd: Path) -> subprocess.Popen[str]:
        """The same without waiting for its end, which is `stop` at the latest."""
        command = subprocess.Popen(
            words, env=self.environment, cwd=cwd,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._commands.append(command)
        return command

    def ask(self, *words: str, check: bool = True) -> str:
        """What a command of SLURM's prints; empty if it fails and `check` is off."""
        done = self.run(*words, cwd=self.folder, timeout=60)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout.strip()

    def submit(self, *words: str, cwd: Path) -> str:
        """The number of a job that sbatch starts."""
        done = self.run("sbatch", "--parsable", *words, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """What `squeue` calls a job's state; empty once it is over."""
        return self.ask("squeue", "-h", "-o", "%T", "-j", job, check=False)

    def wait(self, job: str) -> None:
        """Wait until a job, started as often as it may be, is over."""
        wait_until(lambda: not self.state(job), f"job {job}")


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """A cluster inside the block; its daemons are stopped behind it whatever happens."""
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _package() -> str:
    import loratune

    return str(Path(loratune.__file__).parents[1])


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(number)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]


def wait_until(holds: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Ask twice a second until it holds; fail when `patience` seconds are over."""
    deadline = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < deadline, f"{what}: nothing after {patience} s"
        time.sleep(0.5)
