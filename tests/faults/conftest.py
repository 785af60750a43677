"""The fault suite's fixtures: a forking process, a tiny base, rows, and one shim to the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Case, CommandLine, Outcome

from loratune.adapters.registry import config_class

LENGTHS = (3, 5, 9, 4, 7, 6)
"""Words in the rows' answers: rows of unlike length."""


@dataclass
class Bench:
    """A base, rows, and `loratune train` on them.

    Attributes:
        folder: an empty folder of the test's own.
        shared: the bases and rows, to be read only.
        cli: the command line.
    """

    folder: Path
    shared: Path
    cli: CommandLine
    runs: int = field(default=0)

    def words(self, out: str | Path, *more: str) -> list[str]:
        """`train` for 12 steps of 2 × 2 rows, saved every 3, three epochs of 16 rows."""
        given = {word.partition("=")[0] for word in more}
        defaults = {
            "model": "demo",
            "targets": "attention_qv",
            "data": "local",
            "model.path": str(self.shared / "base"),
            "model.architecture": "null",
            "data.path": str(self.shared / "train.jsonl"),
            "data.eval_path": str(self.shared / "eval.jsonl"),
            "data.max_length": "64",
            "adapter": "lora",
            "adapter.dropout": "0.1",
            "adapter.rank": "2",
            "trainer.steps": "12",
            "trainer.batch_size": "2",
            "trainer.grad_accum_steps": "2",
            "trainer.lr": "0.01",
            "trainer.save_every": "3",
            "trainer.keep_checkpoints": "20",
            "trainer.precision": "fp32",
            "stages": "[train]",
            "evaluate.generate": "false",
            "out": str(out),
        }
        chosen = {key: value for key, _, value in (word.partition("=") for word in more)}
        variant = chosen.get("adapter", "lora")
        given |= {f"adapter.{name}" for name in config_class(variant).without_effect}
        return [
            "train",
            *(f"{key}={value}" for key, value in defaults.items() if key not in given),
            *more,
        ]

    def start(self, out: str | Path, *more: str, **options: Any) -> Case:
        """Start a run."""
        options.setdefault("cwd", self.folder)
        return self.cli.start(*self.words(out, *more), **options)

    def train(self, out: str | Path, *more: str, **options: Any) -> Outcome:
        """Run to the end."""
        return self.start(out, *more, **options).wait()

    def loratune(self, *words: str, **options: Any) -> Outcome:
        """Any other command."""
        options.setdefault("cwd", self.folder)
        return self.cli(*words, **options)

    def copy(self, name: str) -> Path:
        """The test's own copy of something shared."""
        import shutil

        source, target = self.shared / name, self.folder / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        return target


@pytest.fixture(scope="session")
def shared_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def make_inputs(folder: Path) -> None:
    """Two bases of the same shapes, 16 rows to train on and 6 to evaluate on."""
    from support.tiny_models import save_base, tiny_opt

    save_base(folder / "base", tiny_opt(seed=0))
    save_base(folder / "base2", tiny_opt(seed=1))
    write_rows(folder / "train.jsonl", range(16))
    write_rows(folder / "eval.jsonl", range(100, 106))


def write_rows(path: Path, numbers: Sequence[int]) -> None:
    """A question and an answer for each number."""
    rows = [
        {"prompt": f"q{n}", "completion": " ".join([f"{n % 10}"] * LENGTHS[n % len(LENGTHS)])}
        for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def bench(tmp_path: Path, shared_inputs: Path, cli: CommandLine) -> Bench:
    return Bench(tmp_path, shared_inputs, cli)


@pytest.fixture(scope="session")
def session_bench(
    tmp_path_factory: pytest.TempPathFactory, shared_inputs: Path, cli: CommandLine
) -> Bench:
    return Bench(tmp_path_factory.mktemp("session"), shared_inputs, cli)
