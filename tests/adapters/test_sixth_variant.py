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
from adapters.test_contract import TestEveryVariant, gpt2, llama
from safetensors.torch import load_file
from support.command_line import write_rows
from support.tiny_models import FAMILIES, UNEQUAL, load_plain, save_base, token_ids
from torch import Tensor

import loratune
import loratune.adapters
from loratune.adapters.registry import config_class, variant_names
from loratune.merging.weight import merged_weight

STRANGER = Path(__file__).parent.parent / "support" / "sixth_variant"
STRENGTH = 2.0
MAIN = """
import json, sys
import loratune.adapters
loratune.adapters.__path__.append(sys.argv[1])
from loratune.cli.dispatch import dispatch
for words in json.load(sys.stdin):
    sys.stderr.write("$ " + " ".join(words) + "\\n")
    if code := dispatch(words[0], words[1:]):
        sys.exit(code)
"""


def commands(base: Path, rows: Path, family: str) -> list[list[str]]:
    """The whole life of an adapter, one command a line."""
    targets = f"targets.modules=[{','.join(UNEQUAL[family])}]"
    train = [
        f"model.path={base}", "adapter=gain", targets, f"data.path={rows}", f"data.eval_path={rows}",
        "trainer.steps=4", "trainer.epochs=null", "trainer.batch_size=4", "trainer.precision=fp32",
        "trainer.lr=0.05", "trainer.save_every=2", "evaluate.generate=false",
        "stages=[train,evaluate,merge]",
    ]  # fmt: skip
    of_the_run = [f"model.path={base}", "adapter_path=whole/adapter"]
    short = ["compare.steps=5", "compare.rungs=1", "evaluate.generate_limit=0", "out=compared"]
    return [
        ["train", *train, "out=whole"],
        ["train", *train, "out=resumed", "resume=auto"],
        ["train", *train, "adapter_path=whole/adapter", "out=continued", "stages=[train]"],
        ["evaluate", "run=whole", "out=scores.json"],
        ["merge", *of_the_run, "out=merged", "merge.verify=logits"],
        ["verify", "merged", *of_the_run],
        ["verify", "whole"],
        ["export", *of_the_run, "format=peft", "out=exported"],
        ["verify", "exported", *of_the_run],
        ["count-params", f"model.path={base}", targets, "format=json", "out=counts.json"],
        ["plan", *train],
        ["compare", *train[:5], *short, "variants=[gain,lora]", "lr_grid=[0.05]", "seeds=2"],
    ]


@dataclass(frozen=True)
class Life:
    """What the commands left behind."""

    family: str
    base: Path
    folder: Path
    rows: Path

    def run(self, *lines: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", MAIN, str(STRANGER)], input=json.dumps(lines),
            cwd=self.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip


@pytest.fixture(scope="module", params=["opt", "gpt2"])
def life(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Life:
    folder = tmp_path_factory.mktemp(f"gain-{request.param}")
    shutil.copytree(STRANGER / "recipes", folder / "recipes")
    base = save_base(folder / "base", FAMILIES[request.param]())
    life = Life(request.param, base, folder, write_rows(folder / "rows.jsonl"))
    first, *others = commands(life.base, life.rows, life.family)
    done = life.run(first)
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "whole", folder / "resumed")
    for name in ("adapter", "merged", "checkpoints/step_000004"):
        shutil.rmtree(folder / "resumed" / name)
    done = life.run(*others)
    assert done.returncode == 0, done.stderr
    return life


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


def test_training_and_continuing_lower_the_loss(life: Life) -> None:
    losses = {
        run: [
            row["train/loss"]
            for row in map(json.loads, (life.folder / run / "metrics.jsonl").open())
            if "train/loss" in row
        ]
        for run in ("whole", "continued")
    }
    assert losses["whole"][-1] < losses["whole"][0]
    assert losses["continued"][0] < losses["whole"][0]


def test_an_export_is_the_adapter_to_the_bit_and_plain_lora_refuses_by_name(life: Life) -> None:
    ours, exported = (
        load_file(life.folder / folder / "adapter_model.safetensors")
        for folder in ("whole/adapter", "exported")
    )
    assert ours.keys() == exported.keys()
    assert all(torch.equal(ours[key], exported[key]) for key in ours)
    words = ["export", f"model.path={life.base}", "adapter_path=whole/adapter"]
    plain = life.run([*words, "format=lora", "out=plain"])
    assert plain.returncode == 4
    assert "gain is not a product of two factors" in " ".join(plain.stderr.split())
    assert not (life.folder / "plain").exists()


def test_an_adapter_of_another_structure_is_not_continued(life: Life) -> None:
    words = ["adapter_path=whole/adapter", "out=other", f"data.path={life.rows}"]
    done = life.run(["train", f"model.path={life.base}", "adapter=lora", *words])
    assert done.returncode == 2
    assert "the adapter is GAIN, the recipe's variant 'lora' is LORA" in done.stderr


def test_an_adapter_that_changes_nothing_is_not_merged(life: Life) -> None:
    from safetensors.torch import save_file

    still = life.folder / "still"
    shutil.copytree(life.folder / "whole/adapter", still)
    (still / "loratune.json").unlink()
    tensors = load_file(still / "adapter_model.safetensors")
    save_file({k: t.zero_() for k, t in tensors.items()}, still / "adapter_model.safetensors")
    done = life.run(["merge", f"model.path={life.base}", f"adapter_path={still}", "out=no"])
    assert done.returncode == 7
    assert "every correction is zero" in done.stderr


def test_it_is_counted_and_compared_beside_the_others(life: Life) -> None:
    counts = json.loads((life.folder / "counts.json").read_text())
    (gain,) = [row for row in counts["variants"] if row["variant"] == "gain"]
    adapter = load_file(life.folder / "whole/adapter/adapter_model.safetensors")
    assert gain["trainable"] == sum(tensor.numel() for tensor in adapter.values())
    run = json.loads((life.folder / "whole/parameters.json").read_text())
    assert {row["variant"] for row in run["variants"]} == {*variant_names(), "gain"}
    compared = json.loads((life.folder / "compared/comparison.json").read_text())
    assert [one["label"] for one in compared["variants"]] == ["gain", "lora"]
    assert not any(one["reason"] for one in compared["variants"])


def test_its_own_second_setting_is_searched(life: Life) -> None:
    short = ["compare.steps=5", "compare.rungs=1", "evaluate.generate=false", "lr_grid=[0.05]"]
    data = [f"data.path={life.rows}", f"data.eval_path={life.rows}", "trainer.batch_size=4"]
    done = life.run(["tune", f"model.path={life.base}", "adapter=gain", *data, *short, "out=t.yaml"])
    assert done.returncode == 0, done.stderr
    recipe = yaml.safe_load((life.folder / "t.yaml").read_text())
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


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("promise", PROMISES)
def test_it_keeps_every_promise_of_the_contract(gain: str, promise: str, build: Any) -> None:
    getattr(TestEveryVariant(), promise)(gain, build)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [llama, gpt2])
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
    with pytest.raises(loratune.LoratuneError):
        config_class("gain")
