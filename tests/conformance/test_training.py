"""What trains, what stays, and that every way of computing it is the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.peft_oracle import our_model, our_optimizer, our_parameters
from support.tiny_models import ATTENTION, EMBEDDING, FAMILIES, UNEQUAL, logits, tiny_opt, token_ids
from support.tolerance import T0, T1, T2, largest
from torch import Tensor, nn

from loratune.adapters.registry import variant_names
from loratune.surgery import WrappedModel, disabled

VARIANTS: dict[str, dict[str, Any]] = {
    name: {"rank": 8} if name == "vera" else {"rank": 4, "alpha": 8.0} for name in variant_names()
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def loss_of(model: Any, step: int = 0, rows: int = 2) -> Tensor:
    ids = token_ids(step, rows=rows)
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


@torch.no_grad()
def stir(wrapped: WrappedModel) -> None:
    """Give every trained number a random value, so that no gradient is trivially zero."""
    generator = torch.Generator().manual_seed(9)
    for parameter in our_parameters(wrapped).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def gradients(wrapped: WrappedModel, step: int = 0) -> dict[str, Tensor]:
    wrapped.model.zero_grad(set_to_none=True)
    wrapped.model.train()
    loss_of(wrapped.model, step).backward()
    found = {name: parameter.grad for name, parameter in our_parameters(wrapped).items()}
    assert all(gradient is not None for gradient in found.values())
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


@pytest.mark.case(20, T0)
@pytest.mark.case(22, T0)
@every_variant
@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_number_gets_a_gradient_and_nothing_else_moves(
    family: str, variant: str
) -> None:
    wrapped = our_model(FAMILIES[family](), variant, UNEQUAL[family], **VARIANTS[variant])
    stir(wrapped)
    trained = our_parameters(wrapped)
    ids = {id(parameter) for parameter in trained.values()}
    before = {name: tensor.clone() for name, tensor in wrapped.model.state_dict().items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    for step in range(3):
        wrapped.model.zero_grad(set_to_none=True)
        loss_of(wrapped.model.train(), step).backward()
        for name, parameter in wrapped.model.named_parameters():
            assert (parameter.grad is not None) is (id(parameter) in ids), name
        optimizer.step()
    names = {name for name, p in wrapped.model.named_parameters() if id(p) in ids}
    for name, tensor in wrapped.model.state_dict().items():
        assert torch.equal(tensor, before[name]) is (name not in names), name


@pytest.mark.case(23, T1)
@every_variant
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(
    variant: str, reentrant: bool, kernel: str
) -> None:
    base = tiny_opt()
    plain = our_model(
        copy.deepcopy(base), variant, UNEQUAL["opt"], kernel=kernel, **VARIANTS[variant]
    )
    stir(plain)
    recomputed = our_model(base, variant, UNEQUAL["opt"], kernel=kernel, **VARIANTS[variant])
    stir(recomputed)
    model: Any = recomputed.model
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    expected, got = gradients(plain), gradients(recomputed)
    T1.check(loss_of(model.train()), loss_of(plain.model.train()))
    for name, gradient in expected.items():
        T1.check(got[name], gradient, name)


@pytest.mark.case(24, T0)
@pytest.mark.parametrize("kernel", ["reference", "fused"])
@pytest.mark.parametrize("variant", ["lora", "vera"])
def test_gradients_are_the_papers_formulas_to_fp64(variant: str, kernel: str) -> None:
    torch.manual_seed(0)
    n, i, o, r = 11, 7, 5, 3
    linear = nn.Linear(i, o).double()
    settings = {"alpha": 6.0, "rank": r, "kernel": kernel}
    layer: Any = our_model(nn.Sequential(linear), variant, ["0"], **settings).adapters["0"].double()
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    x = torch.randn(n, i, dtype=torch.float64, requires_grad=True)
    g = torch.randn(n, o, dtype=torch.float64)
    layer(x).backward(g)
    W, s = linear.weight.detach(), layer.scaling
    G = g.T @ x.detach()
    if variant == "lora":
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        expected = {layer.lora_B: s * G @ A.T, layer.lora_A: s * B.T @ G}
        delta = s * B @ A
    else:
        A, B = layer.projection.vera_A[:, :i], layer.projection.vera_B[:o]
        d, b = layer.vera_lambda_d.detach(), layer.vera_lambda_b.detach()
        expected = {
            layer.vera_lambda_b: s * (G * (B @ (d[:, None] * A))).sum(1),
            layer.vera_lambda_d: s * (((b[:, None] * B).T @ G) * A).sum(1),
        }
        delta = s * (b[:, None] * B) @ (d[:, None] * A)
    for parameter, gradient in expected.items():
        assert largest(parameter.grad, gradient) < 1e-12
    assert x.grad is not None and largest(x.grad, g @ (W + delta)) < 1e-12
    assert largest(layer(x), x @ (W + delta).T + linear.bias) < 1e-12


@pytest.mark.case(29, T0)
@every_variant
def test_evaluation_ignores_dropout(variant: str) -> None:
    dropped = our_model(tiny_opt(), variant, UNEQUAL["opt"], dropout=0.5, **VARIANTS[variant])
    still = our_model(tiny_opt(), variant, UNEQUAL["opt"], **VARIANTS[variant])
    stir(dropped)
    stir(still)
    T0.check(logits(dropped.model), logits(still.model))
    dropped.model.train()
    drops = "dropout" not in dropped.config.without_effect
    assert torch.equal(loss_of(dropped.model), loss_of(still.model)) != drops


@pytest.mark.case(30, T1)
@every_variant
def test_accumulated_micro_batches_equal_one_batch(variant: str) -> None:
    whole = our_model(tiny_opt(), variant, UNEQUAL["opt"], **VARIANTS[variant])
    parts = our_model(tiny_opt(), variant, UNEQUAL["opt"], **VARIANTS[variant])
    stir(whole)
    stir(parts)
    ids = token_ids(rows=6)
    whole.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for part in ids.split(2):
        loss = parts.model(input_ids=part, labels=part, use_cache=False).loss
        (loss * len(part) / len(ids)).backward()
    together, summed = our_parameters(whole), our_parameters(parts)
    for name, parameter in together.items():
        assert parameter.grad is not None and summed[name].grad is not None
        T1.check(summed[name].grad, parameter.grad, name)


@pytest.mark.case(46, T0)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_plus_with_ratio_one_is_lora(family: str) -> None:
    plus = our_model(FAMILIES[family](), "lora_plus", UNEQUAL[family], rank=4, lr_ratio=1.0)
    plain = our_model(FAMILIES[family](), "lora", UNEQUAL[family], rank=4)
    optimizers = [our_optimizer(w, lr=1e-2, weight_decay=0.1) for w in (plus, plain)]
    for step in range(5):
        for wrapped, optimizer in zip((plus, plain), optimizers, strict=True):
            gradients(wrapped, step)
            optimizer.step()
    for name, parameter in our_parameters(plain).items():
        T0.check(our_parameters(plus)[name].detach(), parameter.detach(), name)


@pytest.mark.case(44, T0)
def test_lora_plus_steps_with_embedding_and_linear_targets_on_a_bare_model() -> None:
    wrapped = our_model(
        tiny_opt(), "lora_plus", [EMBEDDING["opt"], *ATTENTION["opt"]], rank=4, embedding_lr=1e-3
    )
    optimizer = our_optimizer(wrapped, lr=1e-3)
    before = {name: p.detach().clone() for name, p in our_parameters(wrapped).items()}
    for _ in range(2):  # on the same tokens: only their rows of the embedding move
        gradients(wrapped)
        optimizer.step()
    assert all(largest(p, before[name]) > 0 for name, p in our_parameters(wrapped).items())


@pytest.mark.case(48, T0)
@every_variant
@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_number_is_in_exactly_one_group(family: str, variant: str) -> None:
    targets = list(UNEQUAL[family])
    if variant in ("lora", "lora_plus"):
        targets.append(EMBEDDING[family])
    wrapped = our_model(
        FAMILIES[family](tied=False), variant, targets, modules_to_save=("lm_head",),
        **VARIANTS[variant],
    )  # fmt: skip
    members = [id(p) for g in our_optimizer(wrapped, lr=1e-3).param_groups for p in g["params"]]
    trained = {id(p) for p in wrapped.model.parameters() if p.requires_grad}
    assert len(members) == len(set(members)) and set(members) == trained
    assert trained == {id(p) for p in our_parameters(wrapped).values()}


@pytest.mark.case(47, T0)
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_lora_plus_keeps_its_ratio_at_every_step_and_after_a_resume(schedule: str) -> None:
    from loratune.config.schema import Schedule, TrainerConfig
    from loratune.training.optim import make_optimizer, schedule_factor, set_learning_rate
    from loratune.training.state import load_optimizer_tensors, optimizer_tensors

    trainer = TrainerConfig(steps=10, lr=1e-3, warmup_steps=3, schedule=Schedule(schedule))
    wrapped = our_model(tiny_opt(), "lora_plus", ["q_proj"], rank=4, lr_ratio=16.0)
    optimizer = make_optimizer(wrapped.model, wrapped.config, trainer)
    rates = []
    for step in range(10):
        if step == 5:
            state = optimizer_tensors(optimizer, wrapped.model)
            optimizer = make_optimizer(wrapped.model, wrapped.config, trainer)
            load_optimizer_tensors(optimizer, wrapped.model, state)
        set_learning_rate(optimizer, schedule_factor(step, 10, trainer))
        by_name = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert by_name["B"] == pytest.approx(16 * by_name["A"], rel=1e-15)
        rates.append(by_name["A"])
        gradients(wrapped, step)
        optimizer.step()
    assert rates[0] < rates[3] == 1e-3
    assert schedule == "constant" or rates[-1] < rates[3]


@pytest.mark.case(54, T0)
@pytest.mark.case(71, T0)
@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_the_output_keeps_the_bases_dtype_and_the_adapter_stays_in_fp32(
    variant: str, dtype: torch.dtype, kernel: str
) -> None:
    wrapped = our_model(
        tiny_opt().to(dtype), variant, UNEQUAL["opt"], kernel=kernel,
        modules_to_save=("lm_head",), **VARIANTS[variant],
    )  # fmt: skip
    stir(wrapped)
    assert logits(wrapped.model).dtype is dtype
    assert {p.dtype for p in our_parameters(wrapped).values()} == {torch.float32}
    assert all(torch.isfinite(gradient).all() for gradient in gradients(wrapped).values())


@pytest.mark.case(64, T0)
@every_variant
def test_disabled_adapters_give_the_base_and_come_back(variant: str) -> None:
    base = logits(tiny_opt())
    wrapped = our_model(
        tiny_opt(), variant, UNEQUAL["opt"], modules_to_save=("lm_head",), **VARIANTS[variant]
    )
    stir(wrapped)
    adapted = logits(wrapped.model)
    next(iter(wrapped.adapters.values())).enabled = False
    partly = logits(wrapped.model)
    with disabled(wrapped):
        T0.check(logits(wrapped.model), base)
    T0.check(logits(wrapped.model), partly)
    next(iter(wrapped.adapters.values())).enabled = True
    T0.check(logits(wrapped.model), adapted)
    with pytest.raises(ZeroDivisionError), disabled(wrapped):
        raise ZeroDivisionError
    T0.check(logits(wrapped.model), adapted)


@pytest.mark.case(49, T0)
def test_veras_layers_share_their_matrices_and_not_their_vectors() -> None:
    wrapped = our_model(tiny_opt(), "vera", UNEQUAL["opt"], rank=8)
    layers: list[Any] = list(wrapped.adapters.values())
    assert len({layer.projection.vera_A.data_ptr() for layer in layers}) == 1
    assert len({layer.projection.vera_B.data_ptr() for layer in layers}) == 1
    assert len({layer.vera_lambda_d.data_ptr() for layer in layers}) == len(layers)
    assert len({layer.vera_lambda_b.data_ptr() for layer in layers}) == len(layers)


@pytest.mark.case(25, T2)
@every_variant
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_kernel_follows_the_reference_through_training(family: str, variant: str) -> None:
    runs = []
    for kernel in ("reference", "auto"):
        wrapped = our_model(
            FAMILIES[family](), variant, UNEQUAL[family], kernel=kernel, **VARIANTS[variant]
        )
        stir(wrapped)
        optimizer = our_optimizer(wrapped, lr=1e-3, eps=1e-3)
        for step in range(10):
            gradients(wrapped, step)
            optimizer.step()
        runs.append(our_parameters(wrapped))
    for name, parameter in runs[0].items():
        T2.check(runs[1][name], parameter, name)
