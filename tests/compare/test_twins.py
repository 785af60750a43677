"""One training under two names: the losses are the same, and the conditions for it matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from compare.conftest import tiny_config
from loratune.adapters.config import AdapterConfig
from loratune.adapters.lora.config import LoRAConfig
from loratune.adapters.lora_fa.config import LoRAFAConfig
from loratune.adapters.lora_plus.config import LoRAPlusConfig
from loratune.compare.prepare import prepare
from loratune.compare.run import compare
from loratune.compare.settings import Options
from loratune.compare.workbench import Workbench
from loratune.config.schema import CompareConfig, RunConfig
from loratune.training.loop import start, steps

Make = Callable[..., RunConfig]
BLIND = {"clip_norm": 0.0, "eps": 1e-16}
"""Nothing looks at a gradient's size."""
ALIKE, APART = 1e-5, 1e-3
STEPS = 100


@cache
def bench() -> Workbench:
    return Workbench(tiny_config(Path("unused")))


def losses(adapter: AdapterConfig, count: int = STEPS, **trainer: Any) -> list[float]:
    """The training loss of every step, in fp32 on the embedded model."""
    config = replace(bench().config.trainer, steps=count, **{**BLIND, **trainer})
    with bench()._wrapped(adapter, bench().config.targets, seed=0) as (wrapped, head):
        rows = bench()._training_set(bench().rows.train, config, adapter)
        optimizer = start(wrapped, config)
        wrapped.model.train()
        return [step.loss for step in steps(head, rows, optimizer, config)]


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


STRONG = LoRAConfig(rank=4, alpha=16.0, lr=1e-3)
TWINS: dict[str, tuple[AdapterConfig, AdapterConfig]] = {
    "rslora": (LoRAConfig(rank=4, alpha=8.0, rslora=True, lr=1e-3), STRONG),
    "lora_plus": (LoRAPlusConfig(rank=4, alpha=4.0, lr_ratio=4.0, lr=1e-3), STRONG),
    "lora_fa": (
        LoRAFAConfig(rank=4, alpha=16.0, lr=1e-3),
        LoRAFAConfig(rank=4, alpha=4.0, lr=4e-3),
    ),
    "projected": (
        LoRAFAConfig(rank=4, alpha=16.0, lr=1e-3, projected=True),
        LoRAFAConfig(rank=4, alpha=4.0, lr=4e-3, projected=True),
    ),
}
_LOOKS = {"eps": 1e-3, "weight_decay": 0.5, "clip_norm": 1.0}


@pytest.mark.parametrize("name", TWINS)
def test_the_losses_of_twins_are_the_same(name: str) -> None:
    one, other = (losses(adapter) for adapter in TWINS[name])
    assert one[-1] < one[0] / 2
    assert apart(one, other) < ALIKE


@pytest.mark.parametrize("name", ["lora_plus", "lora_fa", "projected"])
@pytest.mark.parametrize("condition", _LOOKS)
def test_what_looks_at_a_gradients_size_keeps_them_apart(name: str, condition: str) -> None:
    one, other = (losses(a, 30, **{condition: _LOOKS[condition]}) for a in TWINS[name])
    assert apart(one, other) > APART


def test_whatever_the_optimizer_does_rslora_is_another_alpha() -> None:
    one, other = (losses(adapter, 30, **_LOOKS) for adapter in TWINS["rslora"])
    assert apart(one, other) < ALIKE


def test_a_start_that_is_taken_away_gives_B_a_scale_of_its_own() -> None:
    plus = LoRAPlusConfig(rank=4, alpha=4.0, lr_ratio=4.0, lr=1e-3, init="pissa")
    lora = LoRAConfig(rank=4, alpha=16.0, lr=1e-3, init="pissa")
    assert apart(losses(plus, 30), losses(lora, 30)) > APART


# -- recognised from configuration alone ------------------------------------------------------


RS = {"adapter": "lora", "adapter.rank": 4, "adapter.alpha": 8, "adapter.rslora": True}
ALPHA = {"adapter": "lora", "adapter.rank": 4, "adapter.alpha": 16}
PLUS = {"adapter": "lora_plus", "adapter.rank": 4, "adapter.alpha": 4, "adapter.lr_ratio": 4}
FA = {"adapter": "lora_fa", "adapter.rank": 4, "adapter.alpha": 16}
FA_FAST = {"adapter": "lora_fa", "adapter.rank": 4, "adapter.alpha": 4}
PISSA = {"adapter.init": "pissa"}
EMBEDDING = {"targets.modules": ["embed_tokens"]}
SAVED = {"targets.modules_to_save": ["final_layer_norm"]}


def found(make: Make, trainer: dict[str, Any], **contenders: Any) -> list[tuple[str, str, float]]:
    """Twins of a comparison that only plans: label, of which, and factor of the rate."""
    config = make(compare=CompareConfig(contenders=contenders, lr_points=3))
    config = replace(config, trainer=replace(config.trainer, **trainer))
    _, plan = prepare(config, Options())
    trained = {one.setting.label for one in plan.searches}
    left_out = [twin for twin in plan.twins if not twin.trained]
    assert trained == contenders.keys() - {twin.label for twin in left_out}
    return [(twin.label, twin.of, pytest.approx(twin.rate_factor)) for twin in left_out]


def test_twins_are_recognised_and_one_of_them_is_planned(tiny: Make) -> None:
    exact = {"clip_norm": 0.0, "eps": 1e-12, "lr": 1e-3}
    assert found(tiny, exact, rs=RS, alpha=ALPHA, plus=PLUS, fa=FA, fast=FA_FAST) == [
        ("alpha", "rs", 1.0), ("plus", "rs", 1.0), ("fast", "fa", 0.25),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "looks",
    [
        {},
        {"clip_norm": 0.0},
        {"eps": 1e-12},
        {"eps": 1e-12, "clip_norm": 0.0, "weight_decay": 0.1},
    ],
)
def test_where_a_gradients_size_matters_only_rslora_is_a_twin(
    tiny: Make, looks: dict[str, float]
) -> None:
    assert found(tiny, looks, rs=RS, alpha=ALPHA, plus=PLUS, fa=FA, fast=FA_FAST) == [
        ("alpha", "rs", 1.0)
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({**PLUS, **PISSA}, {**ALPHA, **PISSA}),
        (ALPHA, {**ALPHA, "adapter.rank": 8}),
        (ALPHA, {**ALPHA, "targets.modules": ["k_proj"]}),
        (ALPHA, {**RS, "trainer.batch_size": 2}),
        (ALPHA, {**RS, "adapter.dropout": 0.1}),
        ({**PLUS, **EMBEDDING}, {**ALPHA, **EMBEDDING}),
        ({**FA, **SAVED}, {**FA_FAST, **SAVED}),
    ],
)  # fmt: skip
def test_what_is_not_the_same_training_is_not_taken_for_it(
    tiny: Make, one: dict[str, Any], other: dict[str, Any]
) -> None:
    exact = {"clip_norm": 0.0, "eps": 1e-12, "lr": 1e-3}
    assert found(tiny, exact, one=one, other=other) == []


def test_fixed_rates_must_correspond(tiny: Make) -> None:
    exact = {"clip_norm": 0.0, "eps": 1e-12}
    fixed = {"compare.lr_points": 1}
    fa, same = {**FA, **fixed, "trainer.lr": 1e-3}, {**FA_FAST, **fixed, "trainer.lr": 4e-3}
    assert found(tiny, exact, fa=fa, same=same) == [("same", "fa", 0.25)]
    assert found(tiny, exact, fa=fa, other={**same, "trainer.lr": 1e-3}) == []


def test_each_layer_counts_with_its_own_rank(tiny: Make) -> None:
    """α/r and α/√r agree at rank 4 for these alphas, and at no other rank."""
    pattern = {"adapter.rank_pattern": {"v_proj": 9}}
    assert found(tiny, {}, rs={**RS, **pattern}, alpha={**ALPHA, **pattern}) == []
    own = {**pattern, "adapter.alpha_pattern": {"v_proj": 24}}
    assert found(tiny, {}, rs={**RS, **pattern}, alpha={**ALPHA, **own}) == [("alpha", "rs", 1.0)]


def test_one_is_trained_and_the_other_is_said_to_be_it(tiny: Make) -> None:
    contenders = {"rs": RS, "alpha": ALPHA, "plus": PLUS}
    config = tiny(compare=CompareConfig(contenders=contenders, lr_points=1, rungs=1))
    config = replace(config, trainer=replace(config.trainer, lr=1e-3))
    result, folder = compare(config, Options(seeds=2))
    assert [one.label for one in result.variants] == ["rs", "plus"]
    assert any(
        line.startswith("alpha was not trained: up to rounding it is the same training as rs")
        for line in result.findings
    )
    assert any(
        line == "plus would be the same training as rs, but for trainer.clip_norm=1 and "
        "trainer.eps at its default."
        for line in result.findings
    )
    assert "not trained: the same training as rs" in (folder / "comparison.md").read_text()
    both = replace(config, compare=replace(config.compare, train_twins=True))
    result, _ = compare(both, Options(seeds=2))
    rs, alpha, _ = result.variants
    assert [run.loss for run in alpha.members] == pytest.approx([run.loss for run in rs.members])
    assert any("what differs between them is rounding" in line for line in result.findings)
