"""Whole runs on the GPU: killed and resumed, evaluated, merged, planned."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import save_base, tiny_llama

import loratune
from gpu.setting import DEVICE, IS_CUDA, VARIANTS
from loratune.cli.dispatch import dispatch
from loratune.plan.memory import ERROR_BAR

ON = f"model.device={DEVICE}"
HERE = str(DEVICE)
PATIENCE = 240.0


def run(*words: str) -> None:
    assert dispatch(words[0], list(words[1:])) == 0, words


def json_of(capfd: pytest.CaptureFixture[str]) -> Any:
    text = capfd.readouterr().out
    return json.loads(text[text.index("{") : text.rindex("}") + 1])


LONG = [
    "train", "recipe=smoke", ON, "stages=[train]", "trainer.steps=400", "trainer.save_every=25",
    "trainer.eval_every=0", "adapter.dropout=0.1", "trainer.precision=bf16",
]  # fmt: skip


def started(*words: str) -> subprocess.Popen[bytes]:
    """`loratune WORDS` in a process of its own."""
    root = str(Path(loratune.__file__).resolve().parent.parent)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    return subprocess.Popen([sys.executable, "-m", "loratune", *words], env=environment)


def test_a_run_that_is_killed_and_resumed_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = started(*LONG, "out=whole"), started(*LONG, "out=killed")
    first, deadline = (
        tmp_path / "killed" / "checkpoints" / "step_000025",
        time.monotonic() + PATIENCE,
    )
    while not first.is_dir() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(PATIENCE) == -signal.SIGKILL, "it ended before it could be killed"
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert whole.wait(PATIENCE) == 0
    run("train", "resume=killed")
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
        one, other = (tmp_path / folder / name for folder in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_is_evaluated_answers_and_merges_as_on_a_cpu(
    variant: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run("train", "recipe=demo", f"adapter={variant}", ON, "trainer.precision=fp32", "out=run",
        "trainer.steps=40", "trainer.eval_every=0", "stages=[train]")  # fmt: skip
    scores, answers = {}, {}
    for place in ("cpu", HERE):
        capfd.readouterr()
        run(
            "evaluate",
            "run=run",
            f"model.device={place}",
            "format=json",
            "evaluate.generate_limit=24",
        )
        scores[place] = json_of(capfd)
        question = "prompt=Which dish is Halney known for?"
        run("generate", "run=run", f"model.device={place}", question, "max_new_tokens=16")
        answers[place] = capfd.readouterr().out
    cpu, here = scores["cpu"], scores[HERE]
    assert answers["cpu"] == answers[HERE]
    assert [s["adapted"] for s in cpu["samples"]] == [s["adapted"] for s in here["samples"]]
    assert [s["base"] for s in cpu["samples"]] == [s["base"] for s in here["samples"]]
    for side in ("base", "adapted"):
        # fp32 in another order: 1e-5 of a loss, and no token's rank changes places.
        assert here[side]["loss"] == pytest.approx(cpu[side]["loss"], rel=1e-5)
        assert here[side]["token_accuracy"] == cpu[side]["token_accuracy"]
        assert here[side]["exact_match"] == cpu[side]["exact_match"]
    run("merge", "run=run", ON, "out=merged")
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["logits"]["max_difference"] <= 1e-4 * report["logits"]["max_logit"]
    run("verify", "merged")


SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64,
    "num_attention_heads": 9, "vocab_size": 49152, "max_position_embeddings": 8192,
    "initializer_range": 0.02,
}  # fmt: skip
TRIAL = SMOLLM2 | {"num_hidden_layers": 2, "vocab_size": 1024}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of SmolLM2-135M's shape in bf16, in fp32 with as many keys as queries.

    In fp32 torch had no attention kernel for fewer keys that does not form the whole T × T matrix.
    Rows fill 512 tokens.
    """
    folder = tmp_path_factory.mktemp("smollm2")
    numbers = SMOLLM2 if IS_CUDA else TRIAL
    for precision, keys in (("bf16", 3), ("fp32", 9)):
        base = tiny_llama(tied=True, num_key_value_heads=keys, **numbers)
        save_base(folder / precision, base.bfloat16())
    text = "".join(chr(97 + n * n % 26) for n in range(700))
    lines = [json.dumps({"text": text[n : n + 600]}) + "\n" for n in range(64)]
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("recompute", ["false", "true"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_peak_is_what_plan_says(
    precision: str, recompute: str, smollm2: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = smollm2 / "rows.jsonl"
    words = [
        "recipe=instruct", f"model.path={smollm2 / precision}", f"data.path={rows}",
        "data.max_length=512", "data.eval_fraction=0", ON, f"trainer.precision={precision}",
        "trainer.epochs=null", "trainer.steps=4", "trainer.batch_size=8",
        "trainer.grad_accum_steps=1", "trainer.eval_every=0", "trainer.save_every=0",
        "trainer.warmup_ratio=0", "targets=all_linear", "stages=[train]",
        f"trainer.gradient_checkpointing={recompute}",
    ]  # fmt: skip
    capfd.readouterr()
    run("plan", *words, "time=false", "format=json")
    plan = json_of(capfd)
    assert plan["device"].startswith(DEVICE.type)
    if not IS_CUDA:
        run("train", *words, "out=run")
        pytest.skip("the peak of a CPU's process is another test's")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run("train", *words, "out=run")
    measured, predicted = torch.cuda.max_memory_allocated() - before, plan["memory"]["peak"]
    line = f"{precision}, recompute {recompute}: predicted {predicted / 1e6:.0f} MB, measured"
    print(f"{line} {measured / 1e6:.0f} MB, error {predicted / measured - 1:+.1%}")
    assert predicted == pytest.approx(measured, rel=ERROR_BAR)
