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
from loratune.runs import sharded
from loratune.training.checkpoints import Checkpoints

gathered = sharded.gathered

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

def rows_of_others_lost(tensor):
    # What the other processes hold of a tensor does not arrive.
    whole, own = gathered(tensor), sharded.own_part(tensor)
    lost = whole.clone()
    if sharded.is_shared_out(tensor):
        lost.zero_()[sharded.rows_of(len(lost))] = own
    return lost

def load_empty(self):
    step = load_best(self)
    with torch.no_grad():
        assert emptied(peft_format.adapter_state(self.wrapped))
    return step

where = sys.argv.pop(1)
if os.environ["RANK"] == "0":
    if where == "file":
        peft_format.save_file = save_empty
    elif where == "gathering":
        peft_format.gathered = rows_of_others_lost
    else:
        Checkpoints.load_best = load_empty
main()
"""


DIFFER = "tensors in the adapter's file are not those that rank"


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
    ("where", "count", "words", "said"),
    [
        ("file", 2, [], DIFFER),
        ("memory", 2, ["adapter=full"], "tensors are not as rank 0 saved them"),
        ("memory", 8, [], DIFFER),
        ("gathering", 2, ["adapter=full"], DIFFER),
        ("gathering", 8, ["targets.modules_to_save=[lm_head]"], DIFFER),
    ],
)
def test_a_file_with_empty_tensors_is_refused_by_every_process(
    tmp_path: Path, where: str, count: int, words: list[str], said: str
) -> None:
    """Wherever they were lost: in the main process's memory, between the processes, at the end."""
    words = [*words, "stages=[train]", "trainer.steps=4", "out=run", "launch.shard=true"]
    for code, text in start(where, count, words):
        last = text.strip().splitlines()[-1]
        assert code == 5, text
        assert said in text, last
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
