"""LoRA-FA: A frozen, B's gradient plain or in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.peft_oracle import our_model, our_optimizer, our_parameters
from support.tiny_models import FAMILIES, UNEQUAL, tiny_opt, token_ids
from support.tolerance import T0, T1, largest
from torch import Tensor, nn

from loratune.adapters.config import Kernel
from loratune.adapters.lora_fa.projection import GramFactor, ProjectedAdamW, projected_gradient
from loratune.adapters.optimizer import OptimizerSettings
from loratune.surgery import WrappedModel
from loratune.training.state import load_optimizer_tensors, optimizer_tensors


def train(wrapped: WrappedModel, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        wrapped.model.train().zero_grad(set_to_none=True)
        ids = token_ids(step)
        wrapped.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()


@pytest.mark.case(31, T0)
@pytest.mark.case(32, T0)
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stays_as_it_was_and_b_moves(family: str, projected: bool) -> None:
    wrapped = our_model(
        FAMILIES[family](), "lora_fa", UNEQUAL[family], rank=4, projected=projected, kernel="auto"
    )
    before = {name: layer.lora_A.clone() for name, layer in wrapped.adapters.items()}
    train(wrapped, our_optimizer(wrapped, lr=1e-2), range(5))
    for name, layer in wrapped.adapters.items():
        assert not layer.lora_A.requires_grad
        T0.check(layer.lora_A, before[name], name)
        assert bool(layer.lora_B.any())


@pytest.mark.case(33, T1)
@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_weight_decay_is_decoupled_and_comes_after_the_step(kernel: str) -> None:
    rate, decay, after = 1e-2, 0.1, []
    for weight_decay in (0.0, decay):
        wrapped = our_model(
            tiny_opt(), "lora_fa", ["q_proj"], rank=4, projected=True, kernel=kernel,
            modules_to_save=("fc2",),
        )  # fmt: skip
        train(wrapped, our_optimizer(wrapped, lr=rate, weight_decay=weight_decay), range(1))
        after.append(our_parameters(wrapped))
    plain, decayed = after
    for name, parameter in plain.items():
        factor = 1.0 if name.endswith("bias") else 1 - rate * decay
        T1.check(decayed[name], parameter * factor, name)


@pytest.mark.case(34, T1)
@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("rslora", [False, True])
def test_every_module_is_projected_with_its_own_scaling(kernel: str, rslora: bool) -> None:
    wrapped = our_model(
        tiny_opt(), "lora_fa", UNEQUAL["opt"], rank=4, alpha=8.0, rslora=rslora, projected=True,
        kernel=kernel, rank_pattern={"fc1": 2}, alpha_pattern={"fc2": 20.0},
    )  # fmt: skip
    optimizer = our_optimizer(wrapped, lr=1e-3)
    train(wrapped, optimizer, range(1))
    assert len({layer.scaling for layer in wrapped.adapters.values()}) == 3
    for name, layer in wrapped.adapters.items():
        A, g = layer.lora_A, layer.lora_B.grad
        if kernel == "auto":  # computes in fp64; the reference is PEFT's rule in fp32
            A, g = A.double(), g.double()
        inverse = torch.linalg.pinv(A @ A.T + 1e-8 * torch.eye(layer.rank))
        expected = (1 - 0.9) * g @ inverse / layer.scaling**2
        got = optimizer.state[layer.lora_B]["exp_avg"]
        T1.check(got / expected.abs().max(), expected / expected.abs().max(), name)


@pytest.mark.case(36, T1)
@pytest.mark.parametrize("scaling", [0.5, 2.0])
def test_the_closed_form_is_the_projection_of_the_full_gradient(scaling: float) -> None:
    torch.manual_seed(0)
    A = torch.randn(5, 40, dtype=torch.float64)
    G = torch.randn(30, 40, dtype=torch.float64)
    projection = A.T @ torch.linalg.inv(A @ A.T) @ A
    step = scaling * projected_gradient(scaling * G @ A.T, A, scaling) @ A
    assert largest(step, G @ projection) < 1e-8
    exact = torch.linalg.lstsq((scaling * A).T, G.T).solution.T
    assert largest(projected_gradient(scaling * G @ A.T, A, scaling), exact) < 1e-8


@pytest.mark.case(36, T1)
def test_a_plain_sgd_step_depends_neither_on_scaling_nor_on_the_basis_of_a() -> None:
    torch.manual_seed(0)
    A, G = torch.randn(5, 40, dtype=torch.float64), torch.randn(30, 40, dtype=torch.float64)
    M = torch.randn(5, 5, dtype=torch.float64) + 3 * torch.eye(5, dtype=torch.float64)
    steps = [
        s * projected_gradient(s * G @ basis.T, basis, s) @ basis
        for s in (0.5, 2.0)
        for basis in (A, M @ A)
    ]
    assert max(largest(step, steps[0]) for step in steps[1:]) < 1e-7


@pytest.mark.case(37, T0)
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_lora_fa_is_lora_whose_a_learns_at_rate_zero(family: str) -> None:
    frozen = our_model(FAMILIES[family](), "lora_fa", UNEQUAL[family], rank=4, alpha=8.0)
    full = our_model(FAMILIES[family](), "lora", UNEQUAL[family], rank=4, alpha=8.0)
    groups = [
        {"params": [layer.lora_A for layer in full.adapters.values()], "lr": 0.0},
        {"params": [layer.lora_B for layer in full.adapters.values()], "lr": 1e-2},
    ]
    train(frozen, our_optimizer(frozen, lr=1e-2), range(10))
    train(full, torch.optim.AdamW(groups, weight_decay=0.0), range(10))
    for name, layer in full.adapters.items():
        T0.check(frozen.adapters[name].lora_B.detach(), layer.lora_B.detach(), name)


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
@pytest.mark.parametrize("scaling", [0.25, 2.0])
def test_the_fast_rule_is_exact_and_the_reference_agrees_within_its_rounding(
    rank: int, scaling: float
) -> None:
    torch.manual_seed(rank)
    A = torch.empty(rank, 768)
    nn.init.kaiming_uniform_(A, a=5**0.5)
    g = torch.randn(128, rank)
    gram = A.double() @ A.double().T
    ridge = 1e-8 * torch.eye(rank, dtype=torch.float64)
    exact = (1 / scaling**2) * g.double() @ torch.linalg.inv(gram + ridge)
    fast, scale = GramFactor(A).solve(g, scaling), float(exact.abs().max())
    eps = torch.finfo(torch.float32).eps
    assert largest(fast / scale, exact / scale) <= eps
    # The reference forms AAᵀ from dot products of 768 terms in fp32, inverts it (which multiplies
    # that error by its condition) and multiplies by r terms.
    bound = eps * (768**0.5 * float(torch.linalg.cond(gram)) + rank)
    assert largest(projected_gradient(g, A, scaling) / scale, exact / scale) <= bound


def test_a_near_singular_gram_matrix_is_warned_about_and_stays_finite() -> None:
    torch.manual_seed(0)
    A = torch.randn(4, 40)
    A[3] = A[2] * (1 + 1e-7)
    with pytest.warns(UserWarning, match="near singular") as caught:
        factor = GramFactor(A, "layers.0.q_proj")
    assert "layers.0.q_proj" in str(caught[0].message)
    assert bool(torch.isfinite(factor.solve(torch.randn(6, 4), 1.0)).all())


def test_the_warning_names_the_layer_when_the_optimizer_is_made() -> None:
    wrapped = our_model(tiny_opt(), "lora_fa", ["q_proj"], rank=4, projected=True, kernel="auto")
    name, layer = next(iter(wrapped.adapters.items()))
    with torch.no_grad():
        layer.lora_A[1] = layer.lora_A[0]
    with pytest.warns(UserWarning, match=name):
        our_optimizer(wrapped, lr=1e-3)


@pytest.mark.case(40, T0)
@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("projected", [False, True])
def test_training_continues_from_saved_state_as_if_it_had_never_stopped(
    kernel: str, projected: bool
) -> None:
    def fresh() -> tuple[WrappedModel, torch.optim.Optimizer]:
        wrapped = our_model(
            tiny_opt(), "lora_fa", UNEQUAL["opt"], rank=4, projected=projected, kernel=kernel
        )
        return wrapped, our_optimizer(wrapped, lr=1e-2, weight_decay=0.01)

    whole, optimizer = fresh()
    train(whole, optimizer, range(6))
    first, optimizer = fresh()
    train(first, optimizer, range(3))
    state = {k: v.clone() for k, v in optimizer_tensors(optimizer, first.model).items()}
    weights = {name: p.detach().clone() for name, p in our_parameters(first).items()}
    second, optimizer = fresh()
    with torch.no_grad():
        for name, parameter in our_parameters(second).items():
            parameter.copy_(weights[name])
    load_optimizer_tensors(optimizer, second.model, state)
    train(second, optimizer, range(3, 6))
    for name, parameter in our_parameters(whole).items():
        T0.check(our_parameters(second)[name].detach(), parameter.detach(), name)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_the_optimizers_own_state_dict_goes_round_too(kernel: str) -> None:
    wrapped = our_model(tiny_opt(), "lora_fa", ["fc1"], rank=4, projected=True, kernel=kernel)
    optimizer = our_optimizer(wrapped, lr=1e-2)
    train(wrapped, optimizer, range(2))
    other = our_optimizer(wrapped, lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    before: dict[str, Any] = optimizer_tensors(optimizer, wrapped.model)
    after = optimizer_tensors(other, wrapped.model)
    assert before.keys() == after.keys() and before
    for name, tensor in before.items():
        T0.check(after[name], tensor, name)


def test_eps_is_added_to_the_uncorrected_root_as_the_paper_has_it() -> None:
    parameter = nn.Parameter(torch.tensor([[1.0]]))
    parameter.grad = torch.tensor([[1e-6]])
    settings = OptimizerSettings(lr=1e-2)
    optimizer = ProjectedAdamW([{"params": [parameter]}], {}, settings, Kernel.auto)
    optimizer.step()
    g = 1e-6
    moved = 1e-2 * (0.001**0.5 / 0.1) * (0.1 * g) / ((0.001**0.5) * g + 1e-6)
    expected: Tensor = torch.tensor([[1.0 - moved]])
    T1.check(parameter.detach(), expected)
