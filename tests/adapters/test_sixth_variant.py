"""A variant in a folder of its own goes everywhere: ΔW depends on W, and no file knows its name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.tiny_models import (
    FAMILIES,
    UNEQUAL,
    load_plain,
    save_base,
    tiny_gpt2,
    tiny_llama,
    token_ids,
)
from torch import Tensor

import loratune
import loratune.adapters
from adapters.test_contract import TestEveryVariant
from loratune.adapters.registry import config_class, variant_names
from loratune.errors import LoratuneError
from loratune.merging.weight import merged_weight

STRANGER = Path(__file__).parent.parent / "support" / "sixth_variant"
STRENGTH = 2.0
ROWS = [
    {"prompt": f"Say {word}.", "completion": f" {word} {word}"}
    for word in ("red", "blue", "green", "grey", "pink", "teal", "gold", "lime")
]
MAIN = """
import json, sys
import loratune.adapters
loratune.adapters.__path__.append(sys.argv[1])
from loratune.cli.dispatch import dispatch
for words in json.load(sys.stdin):
    code = dispatch(words[0], words[1:])
    for stream in (sys.stdout, sys.stderr):
        print(f"{code}\\0", file=stream, flush=True)
"""
"""``python -m loratune`` for many commands in one process, with the stranger's folder added."""


@dataclass(frozen=True)
class Outcome:
    """How one command ended."""

    code: int
    out: str
    err: str


def run(folder: Path, lines: dict[str, list[str]]) -> dict[str, Outcome]:
    """Run command lines one after the other; the names come back with their outcomes."""
    done = subprocess.run(
        [sys.executable, "-c", MAIN, str(STRANGER)], input=json.dumps(list(lines.values())),
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    both = zip(done.stdout.split("\0\n"), done.stderr.split("\0\n"), strict=True)
    outcomes = {}
    for name, (out, err) in zip(lines, both, strict=False):
        code = out.rpartition("\n")[2]
        outcomes[name] = Outcome(int(code), out.removesuffix(code), " ".join(err.split()))
    return outcomes


def train_words(base: Path, rows: Path, family: str) -> list[str]:
    return [
        f"model.path={base}", "adapter=gain", f"targets.modules=[{','.join(UNEQUAL[family])}]",
        f"data.path={rows}", f"data.eval_path={rows}", "trainer.steps=4", "trainer.epochs=null",
        "trainer.batch_size=4", "trainer.precision=fp32", "trainer.lr=0.05",
        "trainer.save_every=2", "evaluate.generate=false", "stages=[train,evaluate,merge]",
    ]  # fmt: skip


def commands(base: Path, rows: Path, family: str) -> dict[str, list[str]]:
    """The whole life of an adapter after its training."""
    train = train_words(base, rows, family)
    adapter = [f"model.path={base}", "adapter_path=whole/adapter"]
    search = [*train[:5], "trainer.batch_size=4", "compare.steps=5", "compare.rungs=1",
              "evaluate.generate=false", "lr_grid=[0.05]"]  # fmt: skip
    return {
        "resume": ["train", *train, "out=resumed", "resume=auto"],
        "continue": ["train", *train, adapter[1], "out=continued", "stages=[train]"],
        "evaluate": ["evaluate", "run=whole"],
        "merge": ["merge", *adapter, "out=merged", "merge.verify=logits"],
        "verify merged": ["verify", "merged", *adapter],
        "verify run": ["verify", "whole"],
        "export": ["export", *adapter, "format=peft", "out=exported"],
        "verify exported": ["verify", "exported", *adapter],
        "count-params": ["count-params", train[0], train[2], "format=json"],
        "plan": ["plan", *train],
        "compare": ["compare", *search, "out=compared", "variants=[gain,lora]", "seeds=2"],
        "tune": ["tune", *search, "out=tuned.yaml"],
        "plain lora": ["export", *adapter, "format=lora", "out=plain"],
        "other structure": ["train", train[0], *train[2:], "adapter=lora", adapter[1], "out=other"],
        "no effect": ["merge", adapter[0], "adapter_path=still", "out=none"],
    }


@dataclass(frozen=True)
class Life:
    """What the commands left behind, and how they ended."""

    family: str
    base: Path
    folder: Path
    outcomes: dict[str, Outcome]


@pytest.fixture(scope="module", params=["opt", "gpt2"])
def life(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Life:
    folder = tmp_path_factory.mktemp(f"gain-{request.param}")
    shutil.copytree(STRANGER / "recipes", folder / "recipes")
    base = save_base(folder / "base", FAMILIES[request.param]())
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["train", *train_words(base, rows, request.param), "out=whole"]
    trained = run(folder, {"train": words})
    assert trained["train"].code == 0, trained["train"].err
    cut_after_step_2(folder / "whole", folder / "resumed")
    without_effect(folder / "whole/adapter", folder / "still")
    outcomes = run(folder, commands(base, rows, request.param))
    return Life(request.param, base, folder, trained | outcomes)


def cut_after_step_2(whole: Path, target: Path) -> None:
    """A run as a kill after its second step would have left it."""
    shutil.copytree(whole, target)
    for name in ("adapter", "merged", "checkpoints/step_000004"):
        shutil.rmtree(target / name)
    for name in ("summary.json", "evaluation.json"):
        (target / name).unlink()


def without_effect(adapter: Path, target: Path) -> None:
    """The adapter with every number zero."""
    shutil.copytree(adapter, target)
    (target / "loratune.json").unlink()
    tensors = load_file(target / "adapter_model.safetensors")
    save_file({k: t.zero_() for k, t in tensors.items()}, target / "adapter_model.safetensors")


REFUSED = {
    "plain lora": (4, "gain is not a product of two factors"),
    "other structure": (2, "the adapter is GAIN, the recipe's variant 'lora' is LORA"),
    "no effect": (7, "every correction is zero"),
}


def test_every_command_succeeds_or_says_why_not(life: Life) -> None:
    for name, outcome in life.outcomes.items():
        code, cause = REFUSED.get(name, (0, ""))
        assert outcome.code == code, f"{name}: {outcome.err}"
        assert cause in outcome.err
        assert "Traceback" not in outcome.err
    assert not (life.folder / "plain").exists()


def expected_weights(life: Life) -> dict[str, Tensor]:
    """Base + adapter by the formula, from the files alone."""
    weights = dict(load_file(life.base / "model.safetensors"))
    for key, gain in load_file(life.folder / "whole/adapter/adapter_model.safetensors").items():
        wanted = key.removeprefix("base_model.model.").removesuffix("gain") + "weight"
        (name,) = [name for name in weights if wanted.endswith(name)]
        by_output = weights[name] if life.family == "opt" else weights[name].T
        factors = 1 + STRENGTH * gain / by_output.norm(dim=1)
        by_output.mul_(factors[:, None])
        assert float((factors - 1).abs().max()) > 1e-3
    return weights


@torch.no_grad()
def test_merged_weights_and_logits_are_those_of_the_formula(life: Life) -> None:
    expected = expected_weights(life)
    for folder in ("merged", "whole/merged"):
        merged = load_file(life.folder / folder / "model.safetensors")
        assert merged.keys() == expected.keys()
        for name, weight in merged.items():
            torch.testing.assert_close(weight, expected[name], msg=name)
    model, ids = load_plain(life.base), token_ids(0)
    before = model(ids).logits.clone()
    model.load_state_dict(expected, strict=False)
    by_formula = model(ids).logits
    assert float((by_formula - before).abs().max()) > 1e-2
    merged_logits = load_plain(life.folder / "merged")(ids).logits
    torch.testing.assert_close(merged_logits, by_formula, atol=1e-5, rtol=1e-5)
    report = json.loads((life.folder / "merged/merge_report.json").read_text())
    assert report["logits"]["max_difference"] <= 1e-5 * report["logits"]["max_logit"]
    assert all(module["probe_error"] < 1e-5 for module in report["modules"])


def test_a_resumed_run_has_the_same_bytes(life: Life) -> None:
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors", "metrics.jsonl"):
        whole, resumed = (life.folder / run / name for run in ("whole", "resumed"))
        assert whole.read_bytes() == resumed.read_bytes(), name


def test_training_lowers_the_loss_and_continuing_goes_on_from_there(life: Life) -> None:
    scores = json.loads((life.folder / "whole/evaluation.json").read_text())
    assert scores["adapted"]["loss"] < scores["base"]["loss"]
    first, second = (
        load_file(life.folder / run / "adapter/adapter_model.safetensors")
        for run in ("whole", "continued")
    )
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[key], second[key]) for key in first)


def test_an_export_is_the_adapter_to_the_bit(life: Life) -> None:
    ours, exported = (
        load_file(life.folder / folder / "adapter_model.safetensors")
        for folder in ("whole/adapter", "exported")
    )
    assert ours.keys() == exported.keys()
    assert all(torch.equal(ours[key], exported[key]) for key in ours)


def test_it_is_counted_and_compared_beside_the_others(life: Life) -> None:
    counts = json.loads(life.outcomes["count-params"].out)
    (gain,) = [row for row in counts["variants"] if row["variant"] == "gain"]
    adapter = load_file(life.folder / "whole/adapter/adapter_model.safetensors")
    assert gain["trainable"] == sum(tensor.numel() for tensor in adapter.values())
    run = json.loads((life.folder / "whole/parameters.json").read_text())
    assert {row["variant"] for row in run["variants"]} == {*variant_names(), "gain"}
    compared = json.loads((life.folder / "compared/comparison.json").read_text())
    assert [one["label"] for one in compared["variants"]] == ["gain", "lora"]
    assert not any(one["reason"] for one in compared["variants"])


def test_its_own_second_setting_is_searched(life: Life) -> None:
    recipe = yaml.safe_load((life.folder / "tuned.yaml").read_text())
    assert recipe["adapter"]["strength"] in (1.0, 3.0)


# -- within this process ---------------------------------------------------------------------


@pytest.fixture
def gain(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The variant's name, registered for one test."""
    monkeypatch.setattr(loratune.adapters, "__path__", [*loratune.adapters.__path__, str(STRANGER)])
    variant_names.cache_clear()
    yield "gain"
    variant_names.cache_clear()


PROMISES = [name for name in vars(TestEveryVariant) if name.startswith("test_")]


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("promise", PROMISES)
def test_it_keeps_every_promise_of_the_contract(gain: str, promise: str, build: Any) -> None:
    getattr(TestEveryVariant(), promise)(gain, build)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_its_merge_proves_itself_in_every_dtype(gain: str, build: Any, dtype: torch.dtype) -> None:
    wrapped = loratune.wrap(build().to(dtype), gain, targets="all-linear")
    for adapter in wrapped.adapters.values():
        torch.nn.init.normal_(adapter.gain)
        weight = adapter.weight.detach().clone()
        merged, proof = merged_weight(weight, [adapter], dtype)
        assert proof.probe_error < 1e-5
        expected = weight.float() + adapter.delta_weight().detach()
        torch.testing.assert_close(merged, expected.to(dtype))
        assert torch.equal(adapter.weight, weight)


def test_its_name_is_gone_afterwards() -> None:
    assert "gain" not in variant_names()
    with pytest.raises(LoratuneError):
        config_class("gain")
