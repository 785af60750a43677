"""What a run leaves in its folder and beside it, also where a later stage fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import CommandLine

ROOT = Path(__file__).parents[2]
QUICK = ("recipe=smoke", "evaluate.generate=false", "trainer.steps=2", "trainer.eval_every=0")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_latest_points_to_a_run_whose_merge_failed(cli: CommandLine) -> None:
    words = ("stages=[train,merge]", "trainer.lr=1e-12", "merge.min_delta_kept=0.9", "name=broken")
    assert "rounding kept only" in cli.refuses("train", *QUICK, *words)
    (adapter,) = Path("outputs/broken").glob("2*/adapter")
    assert Path("outputs/broken/latest").resolve() == adapter.parent.resolve()


def test_final_rows_that_are_missing_stop_a_run_before_it_trains(cli: CommandLine) -> None:
    words = ("stages=[train,evaluate]", "data.test_path=missing.jsonl", "out=run")
    assert "missing.jsonl" in cli.refuses("train", *QUICK, *words)
    assert not Path("run").exists()


def test_the_recorded_command_begins_with_its_subcommand() -> None:
    words = ["train", *QUICK, "stages=[train]", "out=run"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "loratune", *words], check=True, env=environment, capture_output=True
    )
    assert json.loads(Path("run/provenance.json").read_text())["command"][:3] == [
        "loratune", "train", "recipe=smoke",
    ]  # fmt: skip
