"""A file into which most of the tensors came empty is not published, with any number of processes.

So did files come out elsewhere (axolotl#3772): the shards of most ``lora_B`` were left out when
they were gathered, and the file was as large as it should be.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from loratune.errors import TrainingError
from loratune.runs import agreement, processes

EMPTY = """
import os, sys
import torch
from loratune.adapter_files import peft_format
from loratune.cli import main
from loratune.training.checkpoints import Checkpoints

def emptied(tensors):
    # The first layer's are as they should be.
    late = [name for name in tensors if "lora_B" in name or "trained_weight" in name][1:]
    for name in late:
        tensors[name].zero_()
    return bool(late)

save, load_best = peft_format.save_file, Checkpoints.load_best

def save_empty(tensors, *arguments, **named):
    assert emptied(tensors)
    save(tensors, *arguments, **named)

def load_empty(self):
    step = load_best(self)
    with torch.no_grad():
        assert emptied(peft_format.adapter_state(self.wrapped))
    return step

if os.environ["RANK"] == "0":
    if sys.argv.pop(1) == "file":
        peft_format.save_file = save_empty
    else:
        Checkpoints.load_best = load_empty
else:
    del sys.argv[1]
main()
"""


def start(where: str, count: int, words: list[str]) -> list[tuple[int, str]]:
    """Exit code and error output of every process of a run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", EMPTY, where, "train", "recipe=smoke", *words]
    running = []
    for rank in range(count):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
        environment = dict(os.environ) | {key: str(value) for key, value in numbers.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate()[1] for process in running]
    return [(one.returncode, text) for one, text in zip(running, outputs, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "count", "words"),
    [
        ("file", 2, []),
        ("memory", 2, ["adapter=full"]),
        ("memory", 8, []),
    ],
)
def test_a_file_with_empty_tensors_is_refused_by_every_process(
    tmp_path: Path, where: str, count: int, words: list[str]
) -> None:
    words = [*words, "stages=[train]", "trainer.steps=4", "out=run", "launch.shard=true"]
    for code, text in start(where, count, words):
        last = text.strip().splitlines()[-1]
        assert code == 5, text
        assert "tensors in the adapter's file are not those that rank" in text, last
    assert not (tmp_path / "run/adapter").exists()
    assert (tmp_path / "run/checkpoints/step_000004").is_dir()


def test_the_processes_and_the_tensors_that_differ_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = {"a.lora_B": "0", "b.lora_B": "0", "c.lora_A": "1"}
    own = {"a.lora_B": "2", "b.lora_B": "3", "c.lora_A": "1"}
    monkeypatch.setattr(processes, "gather", lambda wrong: [[], wrong])
    with pytest.raises(TrainingError, match=r"2 of 3 .* rank 1 holds: 'a.lora_B'"):
        agreement.check_published(file, own)
    agreement.check_published(own, own)
