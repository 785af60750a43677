"""Full fine-tuning: a plain AdamW loop's weights to the bit; stored, merged, taken off exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import FAMILIES, VOCABULARY, save_base, tiny_gpt2, tiny_llama, tiny_opt
from torch import Tensor, nn

from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.peft_format import peft_notices, read_adapter, write_adapter
from loratune.adapters.full.config import FullConfig
from loratune.adapters.full.rounded import rounded_linear
from loratune.adapters.optimizer import OptimizerSettings, adamw, decayed_and_plain_groups
from loratune.config.convert import to_plain
from loratune.config.schema import MergeConfig, TargetsConfig, TrainerConfig
from loratune.counting.parameters import count_in
from loratune.data.collate import Batch, collate
from loratune.data.encoded_rows import EncodedRow
from loratune.errors import ConfigError
from loratune.loss.causal_model import LanguageModelHead
from loratune.models.architectures import architecture_from_numbers
from loratune.models.measure import measure_model
from loratune.stages.merge import merge
from loratune.surgery import WrappedModel, adapter_state, disabled, merge_model, wrap_model
from loratune.training.optim import make_optimizer
from loratune.training.step import train_step

ALL = FullConfig(every_parameter=True)
STEPS = 4
TRAINER = TrainerConfig(lr=1e-3, weight_decay=0.1)
IDS = torch.arange(12).reshape(2, 6)
both_ties = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
every_family = pytest.mark.parametrize("family", FAMILIES)


def batches(step: int) -> list[Batch]:
    """Two micro-batches of rows with a prompt each."""
    generator = torch.Generator().manual_seed(step)
    ids = [torch.randint(3, VOCABULARY, (9,), generator=generator).tolist() for _ in range(4)]
    rows = [EncodedRow(one, ((3, 9),), 3, "") for one in ids]
    return [collate(rows[at : at + 2], 1, range(at, at + 2)) for at in (0, 2)]


def take_steps(model: Any, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    head = LanguageModelHead(model.eval())
    for step in range(steps):
        train_step(head, batches(step), optimizer, 1.0, step)


def trained(
    model: nn.Module, config: FullConfig = ALL, targets: Any = "all-linear"
) -> WrappedModel:
    wrapped = wrap_model(model, config, TargetsConfig(modules=targets))
    take_steps(wrapped.model, make_optimizer(wrapped.model, config, TRAINER))
    return wrapped


def plainly_trained(model: nn.Module) -> nn.Module:
    """The same steps on the model's own parameters: what the variant must come to."""
    model.requires_grad_(True)
    settings = OptimizerSettings(lr=1e-3, weight_decay=0.1)
    take_steps(model, adamw(decayed_and_plain_groups(model, settings), settings))
    return model


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@both_ties
@every_family
def test_it_trains_the_weights_of_a_plain_loop_to_the_bit(family: str, tied: bool) -> None:
    before = FAMILIES[family](tied=tied).state_dict()
    plain = plainly_trained(FAMILIES[family](tied=tied)).state_dict()
    merged = merge_model(trained(FAMILIES[family](tied=tied)))
    assert not [name for name in plain if torch.equal(plain[name], before[name])]
    assert_equal(dict(merged.state_dict()), dict(plain))
    ends = merged.get_input_embeddings(), merged.get_output_embeddings()
    assert (ends[0].weight is ends[1].weight) is tied
    assert merged.config.tie_word_embeddings is tied


def test_the_targets_alone_train_where_they_are_named() -> None:
    plain = tiny_opt()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name.endswith(("q_proj.weight", "fc1.weight")))
    settings = OptimizerSettings(lr=1e-3, weight_decay=0.1)
    take_steps(plain, adamw(decayed_and_plain_groups(plain, settings), settings))
    merged = merge_model(trained(tiny_opt(), FullConfig(), ["q_proj", "fc1"]))
    assert_equal(dict(merged.state_dict()), dict(plain.state_dict()))


@both_ties
@every_family
def test_it_counts_the_whole_model_once(family: str, tied: bool) -> None:
    model = FAMILIES[family](tied=tied)
    numbers = model.config.to_dict()
    total = sum(parameter.numel() for parameter in model.parameters())
    for architecture in (measure_model(model), architecture_from_numbers(numbers)):
        count = count_in(architecture, [], ALL)
        assert count.trainable == count.stored == total == architecture.base_parameters
        assert sum(module.trainable for module in count.modules) == total
    wrapped = wrap_model(model, ALL, TargetsConfig())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total
    assert sum(tensor.numel() for tensor in adapter_state(wrapped).values()) == total


@both_ties
def test_file_merge_and_disabled_are_exact(tmp_path: Path, tied: bool) -> None:
    base = save_base(tmp_path / "base", tiny_gpt2(tied=tied))
    before = tiny_gpt2(tied=tied)(IDS).logits
    wrapped = trained(tiny_gpt2(tied=tied))
    with torch.no_grad():
        expected = wrapped.model(IDS).logits
        with disabled(wrapped):
            assert torch.equal(wrapped.model(IDS).logits, before)
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = to_plain(wrapped.config)
    facts = {"variant": settings.pop("variant"), "adapter": settings}
    write_adapter(folder, wrapped, facts, "base")
    loaded = wrap_for_loading(tiny_gpt2(tied=tied).eval(), read_adapter(folder))
    assert_equal(adapter_state(loaded), adapter_state(wrapped))
    assert torch.equal(loaded.model(IDS).logits, expected)
    report = merge([read_adapter(folder)], base, tmp_path / "merged", MergeConfig())
    assert report.untied is False and report.logits is not None
    assert report.logits.max_difference == 0.0 and report.delta_kept == 1.0
    assert max(proof.residual for proof in report.modules) == 0.0
    merged = load_file(tmp_path / "merged/model.safetensors")
    plain = plainly_trained(tiny_gpt2(tied=tied)).state_dict()
    assert merged.keys() == load_file(base / "model.safetensors").keys()
    assert not [name for name in merged if not torch.equal(merged[name], plain[name])]


def test_a_difference_would_not_give_the_weights_back() -> None:
    """Why the file holds W': the sum of W and a rounded W' − W misses it."""
    wrapped = trained(tiny_llama())
    layers = wrapped.adapters.values()
    sums = [layer.weight + layer.delta_weight() for layer in layers]
    weights = [layer.trained_parameters()["weight"] for layer in layers]
    assert any(not torch.equal(one, other) for one, other in zip(sums, weights, strict=True))


def test_updates_far_below_bf16_s_spacing_are_not_lost() -> None:
    """A hundred steps of 1e-6 beside weights of about 0.2, whose neighbours lie 1e-3 away."""

    def train(model: Any, parameters: list[nn.Parameter]) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)
        for _ in range(100):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()

    plain = tiny_llama().to(torch.bfloat16)
    start = plain.lm_head.weight.detach().clone()
    train(plain, [plain.lm_head.weight])
    large = start.abs() > 0.05
    assert torch.equal(plain.lm_head.weight[large], start[large])
    wrapped = wrap_model(
        tiny_llama().to(torch.bfloat16), FullConfig(), TargetsConfig(modules=["lm_head"])
    )
    (layer,) = wrapped.adapters.values()
    master = layer.trained_parameters()["weight"]
    train(wrapped.model, [p for p in layer.parameters() if p.requires_grad])
    moved = (master - start.float()).abs()[large]
    assert master.dtype is torch.float32
    assert float(moved.max()) > 9e-5 and float(moved.mean()) > 2e-5


def test_a_bf16_model_computes_what_its_merged_model_does() -> None:
    wrapped = trained(tiny_llama().to(torch.bfloat16), FullConfig())
    layers = dict(wrapped.adapters)
    values = {name: layer.trained_parameters()["weight"].clone() for name, layer in layers.items()}
    with torch.no_grad():
        expected = wrapped.model(IDS).logits
        merged = merge_model(wrapped)
        assert torch.equal(merged(IDS).logits, expected)
    for name, value in values.items():
        assert torch.equal(merged.get_submodule(name).weight, value.to(torch.bfloat16))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_rounded_product_keeps_no_rounded_weight(transposed: bool) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(7, 5) if not transposed else torch.randn(5, 7))
    bias, x = nn.Parameter(torch.randn(7)), torch.randn(2, 3, 5, dtype=torch.bfloat16)
    x.requires_grad_()
    g = torch.randn(2, 3, 7, dtype=torch.bfloat16)

    def plain() -> Tensor:
        rounded = weight.to(torch.bfloat16)
        product = x @ (rounded if transposed else rounded.T)
        return product + bias.to(torch.bfloat16)

    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = rounded_linear(x, weight, bias, transposed=transposed)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), weight.data_ptr()}
    y.backward(g)
    got = [tensor.grad for tensor in (x, weight, bias)]
    x.grad = weight.grad = bias.grad = None
    expected_y = plain()
    expected_y.backward(g)
    torch.testing.assert_close(y, expected_y, atol=0.06, rtol=0.02)
    for one, tensor in zip(got, (x, weight, bias), strict=True):
        assert one is not None and tensor.grad is not None and one.dtype is tensor.dtype
        torch.testing.assert_close(one, tensor.grad, atol=0.06, rtol=0.02)


def test_a_part_cannot_be_left_out_of_the_whole_model() -> None:
    with pytest.raises(ConfigError, match="nothing can be left out") as caught:
        wrap_model(tiny_opt(), ALL, TargetsConfig(exclude=["fc1"]))
    assert caught.value.where == "targets.exclude"


def test_it_says_that_peft_cannot_read_it() -> None:
    (notice,) = peft_notices(wrap_model(tiny_opt(), FullConfig(), TargetsConfig(modules=["fc1"])))
    assert "PEFT cannot use this adapter" in notice and "format=merged" in notice


@pytest.mark.parametrize("word", ["adapter.alpha=4", "adapter.kernel=fused"])
def test_a_setting_without_effect_is_refused(cli: Any, word: str) -> None:
    outcome = cli("train", "recipe=smoke", "adapter=full", word, "out=run")
    assert outcome.code == 2 and "has no effect with full" in outcome.err


def test_the_whole_model_lives_through_every_command(cli: Any, tmp_path: Path) -> None:
    words = (
        "recipe=smoke", "adapter=full", "adapter.every_parameter=true", "trainer.steps=4",
        "trainer.save_every=2", "trainer.lr=1e-3", "merge.dtype=float32",
    )  # fmt: skip
    cli.succeeds("train", *words, "out=whole")
    cut_after_step_2(tmp_path / "whole", tmp_path / "resumed")
    cli.succeeds("train", *words, "out=resumed", "resume=auto")
    names = ("adapter/adapter_model.safetensors", "merged/model.safetensors", "metrics.jsonl")
    for name in names:
        whole, resumed = (tmp_path / run / name for run in ("whole", "resumed"))
        assert whole.read_bytes() == resumed.read_bytes(), name
    scores = json.loads((tmp_path / "whole/evaluation.json").read_text())
    assert scores["adapted"]["loss"] < scores["base"]["loss"]
    checked = cli.succeeds("verify", "run=whole", "model.path=builtin:demo-opt").out
    assert "nothing differs" in checked
    cli.succeeds("export", "run=whole", "format=peft", "out=exported")
    refused = cli("export", "run=whole", "format=lora", "out=plain")
    assert refused.code == 4 and "format=merged" in refused.err


def cut_after_step_2(whole: Path, target: Path) -> None:
    """A run as a kill after its second step would have left it."""
    shutil.copytree(whole, target)
    for name in ("adapter", "merged", "checkpoints/step_000004"):
        shutil.rmtree(target / name)
    for name in ("summary.json", "evaluation.json"):
        (target / name).unlink()
