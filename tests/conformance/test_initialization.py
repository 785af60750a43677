"""How adapters start and scale."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.peft_oracle import our_model
from support.tiny_models import EMBEDDING, FAMILIES, UNEQUAL, logits, tiny_llama, tiny_opt
from support.tolerance import T0, T1, largest
from torch import Tensor, nn

from loratune.adapters.registry import variant_names
from loratune.errors import ConfigError, ModelError

WIDE = 4096


def one_layer(variant: str = "lora", **settings: Any) -> Any:
    """An adapter on one wide linear layer, for distributions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDE, 8))
    wrapped = our_model(model, variant, ["0"], **settings)
    return wrapped.adapters["0"]


def kolmogorov_distance(sample: Tensor, cumulative: Any) -> float:
    """Largest distance between the empirical and a given distribution function."""
    values = sample.detach().flatten().double().sort().values
    steps = torch.arange(1, len(values) + 1).double() / len(values)
    return float((cumulative(values) - steps).abs().max())


def normal(std: float) -> Any:
    return lambda x: 0.5 * (1 + torch.erf(x / (std * math.sqrt(2))))


def uniform(bound: float) -> Any:
    return lambda x: ((x + bound) / (2 * bound)).clamp(0, 1)


@pytest.mark.case(1, T0)
def test_a_is_uniform_within_one_over_root_in_and_b_zero_by_default() -> None:
    layer = one_layer(rank=8)
    bound, limit = 1 / math.sqrt(WIDE), 1.63 / math.sqrt(8 * WIDE)  # 1 % level
    assert kolmogorov_distance(layer.lora_A, uniform(bound)) < limit
    assert kolmogorov_distance(layer.lora_A, normal(bound / math.sqrt(3))) > limit
    T0.check(layer.lora_B.detach(), torch.zeros(8, 8))


@pytest.mark.case(2, T0)
def test_gaussian_a_has_standard_deviation_one_over_rank_and_b_is_zero() -> None:
    layer = one_layer(rank=8, init="gaussian")
    limit = 1.63 / math.sqrt(8 * WIDE)
    assert kolmogorov_distance(layer.lora_A, normal(1 / 8)) < limit
    assert kolmogorov_distance(layer.lora_A, uniform(math.sqrt(3) / 8)) > limit
    T0.check(layer.lora_B.detach(), torch.zeros(8, 8))


@pytest.mark.case(3, T0)
def test_the_random_start_for_tests_changes_the_output_at_once() -> None:
    wrapped = our_model(tiny_opt(), "lora", ["q_proj"], rank=4, init="random")
    assert all(bool(layer.lora_B.all()) for layer in wrapped.adapters.values())
    assert not torch.equal(logits(wrapped.model), logits(tiny_opt()))


@pytest.mark.case(4, T0)
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "random"])
def test_an_embeddings_a_starts_at_zero_and_its_b_normal_whatever_the_flag(init: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 2048))
    layer = our_model(model, "lora", ["0"], rank=4, init=init).adapters["0"]
    lora_A, lora_B = layer.lora_A.detach(), layer.lora_B.detach()
    assert lora_A.shape == (4, 50) and lora_B.shape == (2048, 4)
    assert kolmogorov_distance(lora_B, normal(1.0)) < 1.63 / math.sqrt(lora_B.numel())
    assert bool(lora_A.any()) is (init == "random")


@pytest.mark.case(5, T0)
@pytest.mark.case(6, T0)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [None, 3.0, 32.0])
def test_scaling_is_alpha_over_rank_or_over_its_root(rslora: bool, alpha: float | None) -> None:
    wrapped = our_model(tiny_opt(), "lora", UNEQUAL["opt"], rank=5, alpha=alpha, rslora=rslora)
    expected = (5.0 if alpha is None else alpha) / (math.sqrt(5) if rslora else 5)
    assert {layer.scaling for layer in wrapped.adapters.values()} == {expected}


@pytest.mark.case(7, T0)
@pytest.mark.case(8, T0)
@pytest.mark.parametrize("rslora", [False, True])
def test_rank_and_alpha_patterns_override_each_on_its_own(rslora: bool) -> None:
    wrapped = our_model(
        tiny_opt(), "lora", UNEQUAL["opt"], rank=4, alpha=8.0, rslora=rslora,
        rank_pattern={"fc1": 2, "layers.0.fc2": 3}, alpha_pattern={"fc1": 5.0, "q_proj": 7.0},
    )  # fmt: skip
    found = {
        ".".join(name.split(".")[3:]): (layer.rank, layer.scaling)
        for name, layer in wrapped.adapters.items()
    }
    divide = (lambda a, r: a / math.sqrt(r)) if rslora else (lambda a, r: a / r)
    for block in "01":
        assert found[f"{block}.self_attn.q_proj"] == (4, divide(7.0, 4))
        assert found[f"{block}.fc1"] == (2, divide(5.0, 2))
    assert found["0.fc2"] == (3, divide(8.0, 3)) and found["1.fc2"] == (4, divide(8.0, 4))
    shapes = {name: layer.lora_A.shape[0] for name, layer in wrapped.adapters.items()}
    assert shapes == {name: layer.rank for name, layer in wrapped.adapters.items()}


@pytest.mark.case(9, T0)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("lora", {}),
        ("lora", {"init": "gaussian", "rslora": True}),
        ("lora", {"init": "orthonormal"}),
        ("lora", {"init": "svd"}),
        ("lora_fa", {"alpha": 32.0}),
        ("lora_plus", {}),
        ("vera", {"alpha": 32.0}),
    ],
)
def test_an_untrained_adapter_leaves_the_logits_as_they_are(
    family: str, kernel: str, variant: str, settings: dict[str, Any]
) -> None:
    base = FAMILIES[family]()
    before = logits(base)
    targets = list(UNEQUAL[family])
    if variant in ("lora", "lora_plus"):
        targets.append(EMBEDDING[family])
    wrapped = our_model(base, variant, targets, rank=4, kernel=kernel, **settings)
    T0.check(logits(wrapped.model), before)


@pytest.mark.case(11, T0)
@pytest.mark.parametrize("rank", [0, -1])
@pytest.mark.parametrize("variant", variant_names())
def test_a_rank_below_one_is_an_error(variant: str, rank: int) -> None:
    with pytest.raises(ConfigError, match="too small"):
        our_model(tiny_opt(), variant, ["q_proj"], rank=rank)


@pytest.mark.case(14, T1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", ["svd", "orthonormal"])
def test_svd_and_orthonormal_rows_are_orthonormal_and_leave_w_alone(family: str, init: str) -> None:
    base = FAMILIES[family]()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    wrapped = our_model(base, "lora", UNEQUAL[family], rank=4, init=init)
    for name, layer in wrapped.adapters.items():
        lora_A = layer.lora_A.detach()
        # In fp64: what is left is an fp32 QR's loss of orthogonality, some eps a column.
        off = largest(lora_A.double() @ lora_A.double().T, torch.eye(4))
        assert off <= torch.finfo(torch.float32).eps * lora_A.shape[1], (name, off)
        T0.check(layer.lora_B.detach(), torch.zeros_like(layer.lora_B))
        T0.check(layer.weight.detach(), before[f"{name}.weight"], name)


@pytest.mark.case(14, T1)
@pytest.mark.parametrize("family", FAMILIES)
def test_svd_takes_the_directions_that_the_weight_amplifies_most(family: str) -> None:
    wrapped = our_model(FAMILIES[family](), "lora", UNEQUAL[family], rank=3, init="svd")
    for layer in wrapped.adapters.values():
        linear = layer.shape.kind.value == "linear"
        weight = (layer.weight if linear else layer.weight.T).detach().double()
        gains = (weight @ layer.lora_A.detach().double().T).norm(dim=0)
        T1.check(gains / gains[0], torch.linalg.svdvals(weight)[:3] / gains[0])


def test_more_orthonormal_rows_than_the_input_has_directions_are_refused() -> None:
    with pytest.raises(ModelError, match="orthonormal rows"):
        our_model(tiny_llama(), "lora", ["q_proj"], rank=17, init="orthonormal")


def test_an_unknown_start_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="eva"):
        our_model(tiny_opt(), "lora", ["q_proj"], rank=4, init="eva")
