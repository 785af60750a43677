"""``hydra/launcher=ray`` on a cluster of two nodes on this machine: used, a node killed, stopped.

The nodes are started in a folder of their own, as on other machines, and share the test's folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.command_line import CommandLine

import loratune
from loratune import __version__
from loratune.cli.ray_jobs import Place
from loratune.errors import ConfigError, StorageError

PATIENCE = 300.0
SECOND = "127.0.0.2"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(loratune.__file__).parents[1]),
    "RAY_USAGE_STATS_ENABLED": "0",
}
SWEEP = ("-m", "hydra.sweep.dir=sweep", "hydra/launcher=ray")
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_a_sweep_says_how_to_install_it(cli: CommandLine) -> None:
    found = cli("train", "recipe=smoke", "adapter=lora,lora_fa", *SWEEP)
    assert found.code == 2
    assert found.err.splitlines() == [
        "error[2] Ray is not installed; hydra/launcher=ray; pip install 'loratune[ray]'"
    ]


@needs_ray
def test_a_cluster_that_is_not_there_is_one_line_at_once(cli: CommandLine) -> None:
    address = f"hydra.launcher.ray.init.address=127.0.0.1:{free_port()}"
    found = cli("train", "recipe=smoke", "adapter=lora,lora_fa", *SWEEP, address, timeout=60)
    assert found.code == 2
    assert len(found.err.splitlines()) == 1
    assert "no connection to Ray" in found.err and address in found.err


def test_a_node_with_another_version_or_without_the_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    here = Place(tmp_path, tmp_path / "sweep", __version__)
    with pytest.raises(StorageError, match=r"no folder .*sweep here; node .*same path"):
        here.enter()
    (tmp_path / "sweep" / "multirun.yaml").touch()
    with pytest.raises(ConfigError, match=rf"by loratune 0\.0\.9, this is {__version__}; node"):
        Place(tmp_path, tmp_path / "sweep", "0.0.9").enter()
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    here.enter()
    assert Path.cwd() == tmp_path


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@dataclass
class Cluster:
    """Two nodes of one CPU each."""

    address: str
    nodes: list[subprocess.Popen[bytes]]

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a sweep on it."""
        address = f"hydra.launcher.ray.init.address={self.address}"
        return subprocess.Popen(
            [sys.executable, "-m", "loratune", *words, *SWEEP, address],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill_the_second_node(self) -> None:
        """All its processes, as a power failure would."""
        os.killpg(self.nodes[1].pid, signal.SIGKILL)
        self.nodes[1].wait(PATIENCE)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="Ray is not installed")
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: names of sockets are
    address = f"127.0.0.1:{free_port()}"
    head = [f"--head --port={address.partition(':')[2]} --temp-dir={folder}/head"]
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for number, words in enumerate([*head, f"--address={address} --node-ip-address={SECOND}"]):
            nodes.append(_node(words.split(), folder / f"node-{number}.log", folder))
        yield Cluster(address, nodes)
    finally:
        for node in reversed(nodes):
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait(PATIENCE)
        shutil.rmtree(folder, ignore_errors=True)


def _node(words: list[str], log: Path, folder: Path) -> subprocess.Popen[bytes]:
    """One node, ready."""
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block"]
    limits = ["--num-cpus=1", "--object-store-memory=80000000", "--include-dashboard=false"]
    if "--head" not in words:
        limits.pop()
    for _ in range(3):  # a busy machine may need longer than the 30 seconds that Ray gives itself
        with log.open("wb") as output:
            node = subprocess.Popen(
                [*ray, *words, *limits],
                cwd=folder,
                env=ENVIRONMENT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _wait_until(partial(_is_up_or_gone, node, log))
        if node.poll() is None:
            return node
    raise AssertionError(log.read_text())


def _is_up_or_gone(node: subprocess.Popen[bytes], log: Path) -> bool:
    return "Ray runtime started" in log.read_text() or node.poll() is not None


def _wait_until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _ends(sweep: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == code, output
    assert "Traceback" not in output
    return output


def _starts() -> list[tuple[str, int, int]]:
    """Node, process and job of every start of a job so far."""
    found = []
    for log in Path("sweep").glob("job_*.log"):
        starts = re.findall(r"^node (\S+), process (\d+)$", log.read_text(), re.M)
        found += [(node, int(process), int(log.stem[4:])) for node, process in starts]
    return found


TRAIN = ("train", "recipe=smoke", "stages=[train]", "trainer.steps=60", "trainer.save_every=5")
VARIANTS = ("lora", "lora_fa")


def _here(cli: CommandLine, *words: str) -> None:
    """The same sweep without Ray, in the folder ``here``."""
    cli.succeeds(*words, "-m", "hydra.sweep.dir=here", timeout=PATIENCE)


def _same_adapters() -> None:
    names = sorted(path.parent.name for path in Path("here").glob("*/adapter"))
    assert len(names) == len(VARIANTS)
    for name in names:
        for file in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
            other = Path("here") / name / file
            assert (Path("sweep") / name / file).read_bytes() == other.read_bytes(), (name, file)


def _saved(job: int) -> bool:
    return any(Path("sweep").glob(f"{job}_*/checkpoints/step_*"))


@pytest.mark.slow
def test_a_sweep_uses_both_nodes_and_its_runs_lie_in_its_own_folder(
    cluster: Cluster, cli: CommandLine
) -> None:
    words = (*TRAIN, f"adapter={','.join(VARIANTS)}")
    output = _ends(cluster.start(*words))
    assert "job 1 (" in output and "sweep/job_1.log" in output
    assert len({node for node, _, _ in _starts()}) == 2
    _here(cli, *words)
    _same_adapters()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["node killed", "process killed", "preempted"])
def test_a_run_that_is_lost_goes_on_elsewhere_to_the_same_bytes(
    cluster: Cluster, cli: CommandLine, end: str
) -> None:
    words = (*TRAIN, f"adapter={','.join(VARIANTS)}", "resume=auto")
    sweep = cluster.start(*words)
    _wait_until(lambda: any(node == SECOND and _saved(job) for node, _, job in _starts()))
    [(_, process, job)] = [start for start in _starts() if start[0] == SECOND]
    if end == "node killed":
        cluster.kill_the_second_node()
    else:
        os.kill(process, signal.SIGKILL if end == "process killed" else signal.SIGTERM)
    _ends(sweep)
    log = Path(f"sweep/job_{job}.log").read_text()
    assert len([start for start in _starts() if start[2] == job]) == 2, log
    assert "resuming after step" in log
    assert ("preempted at step" in log) == (end == "preempted")
    _here(cli, *words)
    _same_adapters()


@pytest.mark.slow
def test_ctrl_c_lets_the_jobs_save(cluster: Cluster, cli: CommandLine) -> None:
    words = (*TRAIN, f"adapter={','.join(VARIANTS)}", "resume=auto")
    sweep = cluster.start(*words)
    _wait_until(lambda: _saved(0) and _saved(1))
    sweep.send_signal(signal.SIGINT)
    assert "error[130] interrupted" in _ends(sweep, code=130)
    for log in Path("sweep").glob("job_*.log"):
        assert "interrupted; saved at step" in log.read_text()
    _ends(cluster.start(*words))
    _here(cli, *words)
    _same_adapters()


@pytest.mark.slow
def test_the_parts_of_a_comparison_survive_a_node(cluster: Cluster, cli: CommandLine) -> None:
    words = (
        "compare", "recipe=demo", "compare.steps=10", "trainer.batch_size=4", "data.limit=16",
        "data.eval_limit=4", "compare.heldout_path=null", "compare.rungs=1", "seeds=4",
        "evaluate.generate_limit=2", "evaluate.max_new_tokens=2", "targets=attention_qv",
        "lr_grid=[2e-3,4e-3]", f"variants=[{','.join(VARIANTS)}]",
    )  # fmt: skip
    sweep = cluster.start(*words, "out=parts", "part=1/4,2/4,3/4,4/4")
    _wait_until(lambda: len({node for node, _, _ in _starts()}) == 2 and _claimed_twice())
    cluster.kill_the_second_node()
    _ends(sweep)
    assert len(_starts()) == 5
    cli.succeeds(*words, "out=alone", timeout=PATIENCE)
    assert _without_times("parts") == _without_times("alone")


def _claimed_twice() -> bool:
    """Whether both nodes are at work."""
    return sum(path.stat().st_size > 0 for path in Path("parts/.claims").glob("[btm]*_*")) >= 2


def _without_times(folder: str) -> dict[str, object]:
    """Every result of a comparison's tasks, without what a clock or the memory says."""

    def steady(values: dict[str, object]) -> dict[str, object]:
        return {k: v for k, v in values.items() if "seconds" not in k and "peak" not in k}

    return {
        str(path.relative_to(folder)): json.loads(path.read_text(), object_hook=steady)
        for path in Path(folder).glob("*/**/*.json")
    }
