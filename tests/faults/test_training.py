"""Divergence, memory, and training that would move nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from faults.conftest import Bench
from faults.verify import check_told, verified_steps

LOSS = "torch.nn.functional.log_softmax"


def all_finite(run: Path) -> bool:
    """Whether every tensor that the run published is finite."""
    import torch
    from safetensors.torch import load_file

    return all(
        bool(torch.isfinite(tensor).all())
        for path in run.rglob("*.safetensors")
        for tensor in load_file(path).values()
        if tensor.is_floating_point()
    )


def test_a_run_that_diverges_stops_and_publishes_no_nan(bench: Bench) -> None:
    stopped = bench.train("run", "trainer.lr=1e30", "trainer.clip_norm=0", "trainer.save_every=1")
    check_told(
        stopped, 5, "diverged: the loss is nan", "step 2", "e+30 in model", "lora_", "train.jsonl:"
    )
    assert not (bench.folder / "run" / "adapter").exists()
    assert all_finite(bench.folder / "run")


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_loss_that_is_not_a_number_names_step_and_rows(bench: Bench, kind: str) -> None:
    run = bench.folder / "run"
    # Two micro-batches a step: the ninth loss belongs to step 5.
    stopped = bench.train(run, faults=[f"{kind}@{LOSS}:9"])
    check_told(stopped, 5, "step 5", "train.jsonl:")
    named = stopped.err.partition("rows ")[2].split(";")[0].split(", ")
    assert len(named) == 4, named
    assert verified_steps(run) == [3] and all_finite(run)
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in losses] == [1, 2, 3, 4]
    assert bench.train(run, "resume=auto").code == 0


def test_a_gradient_that_is_not_a_number_names_the_tensor(bench: Bench) -> None:
    run = bench.folder / "run"
    stopped = bench.train(run, faults=["nangrad@loratune.training.step.batch_loss:9"])
    check_told(stopped, 5, "step 5", "the gradient of model.decoder.layers.", "lora_")
    assert verified_steps(run) == [3]


def test_a_parameter_that_is_not_a_number_is_never_published(bench: Bench) -> None:
    run = bench.folder / "run"
    stopped = bench.train(run, faults=["nanparameter@loratune.training.loop.train_step:6"])
    check_told(stopped, 5, "parameter", "not finite", "step 6")
    assert verified_steps(run) == [3] and all_finite(run)


def test_out_of_memory_is_one_line_with_advice(bench: Bench) -> None:
    stopped = bench.train(
        "run", faults=["memory@loratune.training.loop.train_step:4"], limits={"RLIMIT_AS": 1 << 36}
    )
    check_told(stopped, 5, "out of memory", "batch_size 2", "tokens", "grad_accum_steps")
    assert verified_steps(bench.folder / "run") == [3]
    assert bench.train("run", "resume=auto").code == 0


def test_python_running_out_of_memory_is_told_likewise(bench: Bench) -> None:
    stopped = bench.train("run", faults=["memoryerror@loratune.training.loop.train_step:4"])
    check_told(stopped, 5, "out of memory", "grad_accum_steps")


# -- nothing would train -----------------------------------------------------------------------


@pytest.mark.parametrize("words", [("trainer.lr=0",), ("trainer.lr_scale=0", "trainer.lr=null")])
def test_a_learning_rate_of_zero_is_refused_before_the_first_step(
    bench: Bench, words: tuple[str, ...]
) -> None:
    stopped = bench.train("run", *words)
    check_told(stopped, 5, "learning rate", "trainer.lr")
    assert not (bench.folder / "run" / "checkpoints").exists()


def test_nothing_trainable_is_refused_before_the_first_step(bench: Bench) -> None:
    stopped = bench.train("run", faults=["freeze@loratune.pipeline.loading.wrap:1"])
    check_told(stopped, 5, "0 trainable of")
    assert not (bench.folder / "run" / "checkpoints").exists()


def test_adapters_without_a_gradient_are_named_after_three_steps(bench: Bench) -> None:
    """The two sides of a layer that the loss does not reach."""
    stopped = bench.train("run", faults=["detach@loratune.pipeline.loading.wrap:1"])
    check_told(stopped, 5, "had no gradient", "layers.0.", "after step 3")
    assert not (bench.folder / "run" / "adapter").exists()


def test_adapters_that_never_moved_are_not_published(bench: Bench) -> None:
    stopped = bench.train(
        "run", "adapter=lora_fa", faults=["idle@loratune.training.loop.make_optimizer:1"]
    )
    check_told(stopped, 5, "never moved")
    assert not (bench.folder / "run" / "adapter").exists()


def test_gradient_checkpointing_trains_to_the_same_loss(bench: Bench) -> None:
    """Reentrant checkpointing would give the adapters no gradient at all."""
    for name, word in (("plain", "false"), ("recomputed", "true")):
        done = bench.train(name, "adapter.dropout=0", f"trainer.gradient_checkpointing={word}")
        assert done.code == 0, done.err
    plain, recomputed = (
        [
            json.loads(line)["train/loss"]
            for line in (bench.folder / n / "metrics.jsonl").read_text().splitlines()
        ]
        for n in ("plain", "recomputed")
    )
    assert recomputed == pytest.approx(plain, rel=1e-5)
