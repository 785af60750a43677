"""Several processes, with the frozen base whole or sharded, compute what one computes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from loratune.adapters.registry import variant_names
from loratune.cli import main


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record["train/loss"] for record in map(json.loads, lines) if "train/loss" in record]


def norms(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["train/grad_norm"] for line in lines if "train/grad_norm" in line]


def train(monkeypatch, out: str, *words: str) -> int:
    base = ["loratune", "train", "recipe=smoke", "stages=[train]", "trainer.steps=4", f"out={out}"]
    given = {word.partition("=")[0] for word in words}
    kept = [word for word in base if word.partition("=")[0] not in given]
    monkeypatch.setattr(sys, "argv", [*kept, *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_two_processes_with_a_sharded_base_equal_one(monkeypatch, tmp_path, capfd) -> None:
    """A block of OPT returns a view, of which the engine warns: the user never reads that."""
    assert train(monkeypatch, "one") == 0
    assert train(monkeypatch, "sharded", "launch.nproc=2", "launch.shard=true") == 0
    assert "view tensor" not in capfd.readouterr().err
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def evaluated(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["eval/loss"] for line in lines if "eval/loss" in line]


def test_a_process_without_rows_computes_along(monkeypatch, tmp_path) -> None:
    """A sharded base is gathered by all processes: one that is missing would stop the others."""
    words = ["trainer.batch_size=1", "trainer.grad_accum_steps=2", "data.limit=21"]
    words += ["trainer.eval_every=2", "evaluate.batch_size=1", "evaluate.generate_limit=3"]
    words += ["stages=[train,evaluate]"]
    assert train(monkeypatch, "one", *words) == 0
    assert train(monkeypatch, "sharded", *words, *SHARDED) == 0
    for numbers in (losses, evaluated):
        assert numbers(tmp_path / "sharded") == pytest.approx(numbers(tmp_path / "one"), rel=1e-5)
    one, other = (
        json.loads((tmp_path / run / "evaluation.json").read_text()) for run in ("one", "sharded")
    )
    assert other["adapted"]["loss"] == pytest.approx(one["adapted"]["loss"], rel=1e-5)
    assert other["base"]["loss"] == pytest.approx(one["base"]["loss"], rel=1e-5)


SHARDED = ("launch.nproc=2", "launch.shard=true")
LIVES = {
    **{name: [f"adapter={name}", "targets=all_linear"] for name in variant_names()},
    "every parameter": ["adapter=full", "adapter.every_parameter=true"],
    "embedding": ["adapter=dora", "targets.modules=[embed_tokens,q_proj]"],
    "readable kernel": ["adapter=dora", "adapter.kernel=reference", "targets=all_linear"],
    "recomputed": ["adapter=dora", "trainer.gradient_checkpointing=true"],
    "a start taken away": ["adapter=lora", "adapter.init=pissa"],
    "tokens": ['model.add_tokens=["<think>"]', 'targets.tokens=["."]'],
    "a module": ["targets.modules_to_save=[lm_head]"],
}
"""Every variant, and what else trains."""
SHARED_OUT = {"full", "every parameter", "a module"}
"""What trains there is sharded too.  The norm of its gradient is summed in another order; without
clipping it is only written down, and two processes add up gradients to the same bytes."""


def same_bytes(one: Path, other: Path, *names: str) -> None:
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("life", LIVES)
def test_what_trains_does_not_see_whether_the_base_is_sharded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, life: str
) -> None:
    """Trained, cut off, resumed and merged as by two processes with a whole base each."""
    words = [*LIVES[life], "stages=[train,merge]", "trainer.save_every=2"]
    words += ["trainer.clip_norm=0"] if life in SHARED_OUT else []
    assert train(monkeypatch, "one", *LIVES[life], "trainer.steps=1") == 0
    assert train(monkeypatch, "whole", *words, "launch.nproc=2") == 0
    assert train(monkeypatch, "sharded", *words, *SHARDED) == 0
    assert losses(tmp_path / "sharded")[:1] == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    last, end = "checkpoints/step_000004", ("adapter/adapter_model.safetensors", "metrics.jsonl")
    states = [f"{last}/{name}.safetensors" for name in ("adapter", "optimizer")]
    same_bytes(tmp_path / "sharded", tmp_path / "whole", *states, end[0])
    assert losses(tmp_path / "sharded") == losses(tmp_path / "whole")
    if life not in SHARED_OUT:
        same_bytes(tmp_path / "sharded", tmp_path / "whole", end[1])
    assert norms(tmp_path / "sharded") == pytest.approx(norms(tmp_path / "whole"), rel=1e-5)
    merged = (tmp_path / run / "merged/model.safetensors" for run in ("sharded", "whole"))
    assert len({path.read_bytes() for path in merged}) == 1
    shutil.copytree(tmp_path / "sharded", tmp_path / "resumed")
    for name in ("adapter", "merged", last):
        shutil.rmtree(tmp_path / "resumed" / name)
    (tmp_path / "resumed/summary.json").unlink()
    assert train(monkeypatch, "resumed", *words, *SHARDED, "resume=auto") == 0
    same_bytes(tmp_path / "resumed", tmp_path / "sharded", *states, *end)


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
    assert last.startswith("error[5] torch.compile failed: No working C++ compiler")
    assert "trainer.compile=false" in last
