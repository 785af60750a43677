"""Runs on a base in 4 or 8 bits: resumed to the byte, bound to how it was quantized, merged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantized import KINDS, wide_base
from support.tiny_models import logits

from faults.conftest import Bench
from faults.harness import result
from faults.test_resume import cut
from faults.verify import check_recovered
from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.peft_format import read_adapter
from loratune.models.fingerprint import base_fingerprint
from loratune.models.load import load_model
from loratune.models.quantized.format import identity

STEPS = ("trainer.steps=5", "trainer.save_every=1", "trainer.eval_every=0")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_base(tmp_path_factory.mktemp("quantized") / "base")


def words(base: Path, kind: str = "nf4") -> tuple[str, ...]:
    quantization = KINDS[kind]
    return (
        f"model.path={base}",
        f"model.quantize={quantization.kind}",
        f"model.quantize_double={str(quantization.double).lower()}",
        "targets=all_linear",
        *STEPS,
    )


def model_of(base: Path, run: Path, kind: str = "nf4") -> Any:
    """The quantized base with a run's adapter, as training had it."""
    model = load_model(base, torch.float32, quantization=KINDS[kind])
    return wrap_for_loading(model, read_adapter(run / "adapter")).model


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_a_resumed_run_has_the_bytes_of_an_uninterrupted_one(
    bench: Bench, base: Path, kind: str
) -> None:
    whole = bench.folder / "whole"
    assert bench.train(whole, *words(base, kind)).code == 0
    run = cut(whole, bench.folder / "cut", 3)
    check_recovered(run, bench.train(run, *words(base, kind), "resume=auto"), result(whole))


def test_how_the_base_is_quantized_belongs_to_its_identity(bench: Bench, base: Path) -> None:
    run = bench.folder / "run"
    assert bench.train(run, *words(base)).code == 0
    facts = read_adapter(run / "adapter").facts
    assert facts["base"] == identity(base_fingerprint(base), KINDS["nf4"])
    assert facts["quantization"]["weights"] == base_fingerprint(base)
    origin = json.loads((run / "provenance.json").read_text())
    assert origin["quantization"]["kind"] == "nf4"
    stopped = cut(run, bench.folder / "stopped", 3)
    told = bench.train(stopped, *words(base, "int8"), "resume=auto")
    assert told.code == 6
    assert "model.quantize: nf4 → int8" in told.err and "base: " in told.err
    evaluated = bench.loratune("evaluate", f"run={run}", "model.quantize=fp4")
    assert evaluated.code == 6 and "base: " in evaluated.last


def test_a_merge_asks_which_weights_and_proves_either(bench: Bench, base: Path) -> None:
    run = bench.folder / "run"
    assert bench.train(run, *words(base), "trainer.lr=0.05").code == 0
    expected = logits(model_of(base, run))
    asked = bench.loratune("merge", f"run={run}")
    assert asked.code == 7 and not (run / "merged").exists()
    for choice in ("dequantized", "original"):
        assert f"loratune merge adapter_path={run / 'adapter'} base={choice}" in asked.last
        out = bench.folder / choice
        done = bench.loratune("merge", f"run={run}", f"base={choice}", f"out={out}")
        assert done.code == 0, done.err
        merged = load_model(out, torch.float32)
        difference = float((logits(merged) - expected).abs().max())
        report = json.loads((out / "merge_report.json").read_text())["quantized"]
        trained, compared = report["comparisons"]
        assert report["merged_into"] == choice and trained["kl"] == 0
        if choice == "dequantized":
            assert difference <= 1e-4 * max(1.0, float(expected.abs().max()))
            assert compared["top1"] == 1 and compared["kl"] < 1e-6
        else:
            assert difference > 1e-2 and compared["kl"] > 1e-6
            plain = wrap_for_loading(
                load_model(base, torch.float32), read_adapter(run / "adapter")
            ).model
            torch.testing.assert_close(logits(merged), logits(plain), rtol=1e-4, atol=1e-4)
    verified = bench.loratune("verify", str(bench.folder / "original"), f"model.path={base}")
    assert verified.code == 0, verified.text


def test_the_result_can_be_written_in_4_bits_again(bench: Bench, base: Path) -> None:
    run, out = bench.folder / "run", bench.folder / "again"
    assert bench.train(run, *words(base)).code == 0
    settings = (f"run={run}", "base=original", "requantize=nf4", f"out={out}")
    done = bench.loratune("merge", *settings)
    assert done.code == 0, done.err
    assert re.search(r"the same in nf4 +│", done.out)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    compared = json.loads((out / "merge_report.json").read_text())["quantized"]["comparisons"]
    assert [one["model"] for one in compared][-1] == "the same in nf4"
    assert compared[-1]["kl"] > compared[0]["kl"]
    assert "quantized to nf4 once merged" in (out / "README.md").read_text()
    assert bench.loratune("verify", str(out)).code == 0
    # The folder that came out of it is a base itself, trained as it is.
    second = bench.folder / "second"
    trained = bench.train(second, f"model.path={out}", "targets=all_linear", *STEPS)
    assert trained.code == 0, trained.err
    merged = bench.folder / "second-merged"
    ends = bench.loratune("merge", f"run={second}", "base=dequantized", f"out={merged}")
    assert ends.code == 0, ends.err
    refused = bench.loratune("merge", f"run={second}", "base=original", f"out={merged}2")
    assert refused.code == 7 and "do not hold the original weights" in refused.last


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("adapter=full",), 2, "full cannot adapt a quantized base"),
        (("model.quantize=null",), 2, "model.quantize_skip has no effect"),
        (("targets.modules_to_save=[down_proj]",), 4, "is quantized, and cannot be trained"),
        (("launch.shard=true", "launch.nproc=2"), 2, "a quantized base cannot be sharded"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    bench: Bench, base: Path, more: tuple[str, ...], code: int, said: str
) -> None:
    own = tuple(word for word in words(base) if word.partition("=")[0] not in {
        one.partition("=")[0] for one in more
    })  # fmt: skip
    skip = ("model.quantize_skip=[o_proj]",) if code == 2 and "skip" in said else ()
    targets = ("targets=attention_qv",) if code == 4 else ()
    own = tuple(w for w in own if not (targets and w.startswith("targets=")))
    told = bench.train(bench.folder / "run", *own, *more, *skip, *targets)
    assert told.code == code and said in told.err and not told.has_traceback


def test_a_merge_choice_without_a_quantized_base_is_refused(bench: Bench) -> None:
    run = bench.folder / "run"
    assert bench.train(run, *STEPS).code == 0
    told = bench.loratune("merge", f"run={run}", "base=original")
    assert told.code == 2 and "not trained on a quantized base" in told.last
