"""Train PEFT's model and loratune's on the same batches and compare them at every step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from support.peft_oracle import our_model, our_parameters, peft_model, peft_parameters
from support.tiny_models import token_ids
from support.tolerance import T0
from torch import Tensor, nn

from loratune.surgery import WrappedModel

STEPS, SEED = 20, 11
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


def both_models(
    base: nn.Module,
    peft_config: Any,
    variant: str,
    targets: Any,
    *,
    check: bool = True,
    **settings: Any,
) -> tuple[Any, WrappedModel]:
    """The same base adapted by PEFT and by loratune from the same seed; starts must agree."""
    theirs = peft_model(copy.deepcopy(base), peft_config, SEED)
    ours = our_model(copy.deepcopy(base), variant, targets, seed=SEED, **settings)
    if check:
        compare(our_parameters(ours), peft_parameters(theirs), "start")
    return theirs, ours


def compare(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], when: str) -> None:
    """Same names, equal tensors, to the bit."""
    assert sorted(got) == sorted(expected)
    for name, tensor in expected.items():
        T0.check(got[name].detach(), tensor.detach(), f"{when}: {name}")


def train_both(
    theirs: Any,
    ours: WrappedModel,
    their_optimizer: torch.optim.Optimizer,
    our_optimizer: torch.optim.Optimizer,
    *,
    steps: int = STEPS,
) -> list[float]:
    """Losses of the common training; loss, gradients and weights are equal after every step."""
    their_parameters, our_own = peft_parameters(theirs), our_parameters(ours)
    before = {name: tensor.detach().clone() for name, tensor in our_own.items()}
    losses = []
    for step in range(steps):
        their_loss = one_backward(theirs, their_optimizer, step)
        our_loss = one_backward(ours.model, our_optimizer, step)
        T0.check(our_loss, their_loss, f"loss of step {step}")
        compare(_gradients(our_own), _gradients(their_parameters), f"gradients of step {step}")
        their_optimizer.step()
        our_optimizer.step()
        compare(our_own, their_parameters, f"weights after step {step}")
        losses.append(float(our_loss))
    unmoved = [name for name, tensor in our_own.items() if torch.equal(tensor, before[name])]
    assert not unmoved, f"training moved nothing in {unmoved}"
    return losses


def one_backward(model: Any, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
    """The loss of one batch, with gradients; the same dropout masks whoever computes it."""
    model.train()
    optimizer.zero_grad(set_to_none=True)
    torch.manual_seed(100 + step)
    ids = token_ids(step)
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


def _gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    missing = [name for name, parameter in parameters.items() if parameter.grad is None]
    assert not missing, f"no gradient reached {missing}"
    return {
        name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None
    }
