"""Several processes, with the frozen base whole or sharded, compute what one computes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from loratune.cli import main


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


def train(monkeypatch, out: str, *words: str) -> int:
    base = ["loratune", "train", "recipe=smoke", "stages=[train]", "trainer.steps=4", f"out={out}"]
    monkeypatch.setattr(sys, "argv", [*base, *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_two_processes_with_a_sharded_base_equal_one(monkeypatch, tmp_path) -> None:
    assert train(monkeypatch, "one") == 0
    assert train(monkeypatch, "sharded", "launch.nproc=2", "launch.shard=true") == 0
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_sharding_with_one_process_is_refused(monkeypatch, capfd) -> None:
    assert train(monkeypatch, "run", "launch.shard=true") == 2
    assert "launch.nproc" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_a_compiled_backbone_trains_the_same(monkeypatch, tmp_path) -> None:
    words = ["targets.modules=[q_proj]", "targets.layers=[0]"]
    assert train(monkeypatch, "eager", *words) == 0
    assert train(monkeypatch, "compiled", "trainer.compile=true", *words) == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


def test_what_the_compiler_refuses_is_said_in_one_line(monkeypatch, tmp_path, capfd) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    from loratune.loss.causal_model import LanguageModelHead

    def refuse(self) -> None:
        raise BackendCompilerFailed("inductor", RuntimeError("No working C++ compiler\nmore"), None)

    monkeypatch.setattr(LanguageModelHead, "compile_backbone", refuse)
    assert train(monkeypatch, "run", "trainer.compile=true") == 5
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error[5] torch.compile failed: ")
    assert "trainer.compile=false" in last
