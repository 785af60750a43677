"""One base for every training: same order, same scores as evaluation's, restored bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from loratune.adapters.config import AdapterConfig
from loratune.adapters.registry import variant_names
from loratune.compare.memory import peak_bytes
from loratune.compare.search import Point
from loratune.compare.workbench import Workbench
from loratune.config.recipes.variant_settings import variant_settings
from loratune.config.schema import RunConfig, TargetsConfig
from loratune.data.arrangement import Arrangement
from loratune.data.training_set import TrainingSet
from loratune.loss.causal_model import LanguageModelHead
from loratune.stages.evaluate import evaluation_loss
from loratune.surgery import unwrap_model, wrap_model

Make = Callable[..., RunConfig]


def small(name: str) -> AdapterConfig:
    return replace(variant_settings(name), rank=4, lr=4e-3)


def using(bench: Workbench, adapter: AdapterConfig) -> RunConfig:
    return replace(bench.config, adapter=adapter)


@pytest.fixture
def bench(tiny: Make) -> Workbench:
    return Workbench(tiny())


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", variant_names())
def test_a_training_leaves_the_base_bit_for_bit_as_it_was(bench: Workbench, name: str) -> None:
    model = bench.base.model
    before, modules = state(model), {n: type(m) for n, m in model.named_modules()}
    bench.trial(using(bench, small(name)), Point(4e-3), 3)
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert {n: type(m) for n, m in model.named_modules()} == modules
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_unwrapping_restores_merged_and_saved_modules_too(bench: Workbench) -> None:
    model = bench.base.model
    before = state(model)
    targets = TargetsConfig(modules=["q_proj"], modules_to_save=["final_layer_norm"])
    wrapped = wrap_model(model, small("lora"), targets)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    for adapter in wrapped.adapters.values():
        adapter.merge()
    unwrap_model(wrapped)
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_every_variant_sees_the_same_rows_in_the_same_order(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    batch = TrainingSet.batch

    def noted(self: TrainingSet, numbers: list[int]) -> object:
        seen.append(tuple(numbers))
        return batch(self, numbers)

    monkeypatch.setattr(TrainingSet, "batch", noted)
    orders = {}
    for name in variant_names():
        seen.clear()
        member = bench.seed_run(using(bench, small(name)), seed=7).member
        # The last batch is the one whose memory is measured.
        orders[name] = (tuple(seen[:-1]), member.order)
    assert len(set(orders.values())) == 1
    rows, _ = orders["lora"]
    assert len(rows) == 5
    seen.clear()
    other = bench.seed_run(using(bench, small("lora")), seed=8).member
    assert tuple(seen[:-1]) != rows
    assert other.order != orders["lora"][1]


def test_a_member_is_the_same_twice(bench: Workbench) -> None:
    first, second = (bench.seed_run(using(bench, small("lora")), seed=3) for _ in range(2))
    assert first.test == second.test
    assert first.answers == second.answers
    assert [p.dev_loss for p in first.member.curve] == [p.dev_loss for p in second.member.curve]


def test_the_search_trains_with_a_seed_that_no_member_has(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    monkeypatch.setattr(
        bench,
        "_wrapped",
        lambda config, targets, seed: seeds.append(seed) or (_ for _ in ()).throw(KeyError),
    )
    with pytest.raises(KeyError):
        bench.trial(using(bench, small("lora")), Point(1e-3), 3)
    assert seeds == [1000]


def test_scores_by_prompt_add_up_to_the_evaluations_loss(bench: Workbench) -> None:
    scores = bench.base_scores()
    head = LanguageModelHead(bench.base.model)
    loss, accuracy, tokens = evaluation_loss(head, bench.rows.test, bench.arrangement, 16)
    assert scores.test.mean_loss == pytest.approx(loss, rel=1e-5)
    assert scores.test.token_accuracy == pytest.approx(accuracy)
    assert sum(scores.test.tokens) == tokens
    assert scores.member.loss == scores.test.mean_loss


def test_a_member_measures_what_it_promises(bench: Workbench) -> None:
    member = bench.seed_run(using(bench, small("lora")), seed=0).member
    base = bench.base_scores().member
    assert member.loss is not None and base.loss is not None
    assert member.loss < base.loss
    assert [point.step for point in member.curve] == [0, 1, 2, 3, 4, 5]
    assert member.curve[0].train_loss is None
    assert member.curve[-1].tokens > member.curve[1].tokens > 0
    assert member.merge_residual is not None and 0 < member.merge_residual < 1e-4
    assert member.step_seconds is not None and member.step_seconds > 0


def test_a_rate_that_diverges_is_a_result_with_its_reason(bench: Workbench) -> None:
    trial = bench.trial(using(bench, small("lora")), Point(1e30), 4)
    assert trial.loss is None
    assert trial.reason
    assert bench.trial(using(bench, small("lora")), Point(1e-3), 3).loss is not None


def test_a_frozen_factor_costs_less_than_a_trained_one(bench: Workbench) -> None:
    lora, frozen = (bench.costs(using(bench, small(name))) for name in ("lora", "lora_fa"))
    assert frozen.trainable * 2 == lora.trainable
    assert frozen.optimizer_bytes * 2 == lora.optimizer_bytes
    assert frozen.stored_bytes == lora.stored_bytes
    assert lora.activation_bytes_per_token is not None
    assert frozen.activation_bytes_per_token is not None
    assert frozen.activation_bytes_per_token < lora.activation_bytes_per_token


def test_peak_memory_is_what_the_tensors_of_a_step_take() -> None:
    """One weight of 1 MB, SGD with momentum: weight, momentum, gradient, and a copy of 1 MB."""
    model = nn.Linear(512, 512, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()

    def step() -> None:
        model.weight.grad = torch.ones_like(model.weight)
        copy = model.weight.detach().clone()
        del copy

    weight = 4 * 512 * 512
    assert peak_bytes(model, optimizer, step) == pytest.approx(4 * weight, rel=0.01)


def test_a_setting_with_dropout_shares_no_masks(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.arrangement.share == "auto"
    shares = []
    build = TrainingSet.from_config

    def watched(rows: object, arrangement: Arrangement, *others: object) -> TrainingSet:
        shares.append(arrangement.share)
        return build(rows, arrangement, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingSet, "from_config", watched)
    bench.trial(using(bench, small("lora")), Point(4e-3), 2)
    bench.trial(using(bench, replace(small("lora"), dropout=0.1)), Point(4e-3), 2)
    assert shares == ["auto", "never"]


def test_a_contender_trains_as_it_would_on_a_bench_of_its_own(bench: Workbench, tiny: Make) -> None:
    """Other targets, batch and length on the common base: the numbers of a base for it alone."""
    trainer = replace(bench.config.trainer, batch_size=8, steps=3)
    own = tiny(targets=TargetsConfig(modules=["fc1", "fc2"]), trainer=trainer)
    alone, common = Workbench(own).seed_run(own, seed=1), bench.seed_run(own, seed=1)
    assert common.test == alone.test
    assert common.member.order == alone.member.order
    assert bench.steps(own) == 3
    assert common.test != bench.seed_run(bench.config, seed=1).test
    rates = [b.trial(own, Point(4e-3), 2).loss for b in (Workbench(own), bench)]
    assert rates[0] == rates[1]
