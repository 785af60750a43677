"""Everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from loratune.adapters.optimizer import trainable_parameters
from loratune.errors import CheckpointError
from loratune.runs import processes
from loratune.runs.checkpoint import Checkpoint
from loratune.runs.sharded import is_shared_out, own_part, part_of, shared_out_as
from loratune.surgery import WrappedModel


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done; the data cursor, since a step's rows follow from its number.
        tokens: supervised tokens seen.
        best_step: step of the best evaluation, 0 for none.
        best_loss: its loss.
        stale_evaluations: evaluations since without a better loss.
        seen_gradient: tensor name to whether it ever had a gradient.
        watched_steps: steps that the gradient watch has judged by.
        initial: tensor name to sha256 of its start.
        drift: changes that were allowed at earlier resumes.
    """

    step: int = 0
    tokens: int = 0
    best_step: int = 0
    best_loss: float | None = None
    stale_evaluations: int = 0
    seen_gradient: dict[str, bool] = field(default_factory=dict)
    watched_steps: int = 0
    initial: dict[str, str] = field(default_factory=dict)
    drift: list[str] = field(default_factory=list)

    def count_evaluation(self, loss: float) -> bool:
        """Take in an evaluation after the current step; whether it is the best so far."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.stale_evaluations = loss, self.step, 0
            return True
        self.stale_evaluations += 1
        return False

    def is_stale(self, patience: int) -> bool:
        """Whether ``patience`` evaluations in a row brought no better loss; 0 waits for ever."""
        return bool(patience) and self.stale_evaluations >= patience


def adapter_tensors(wrapped: WrappedModel) -> dict[str, Tensor]:
    """Every tensor that belongs to the adapter, under the model's own names, without rescaling."""
    named: dict[Tensor, str] = {}  # of a tensor that several layers train, the first name
    for name, adapter in wrapped.adapters.items():
        own = {f"{name}.{key}": value for key, value in adapter.adapter_tensors().items()}
        for key, value in (own | adapter.shared_tensors()).items():
            named.setdefault(value, key)
    for name, rows in wrapped.token_rows.items():
        named.setdefault(rows.rows, f"{name}.rows")
    tensors = {key: value.detach() for value, key in named.items()}
    for name, saved in wrapped.saved_modules.items():
        for key, value in saved.trained_module.state_dict().items():
            tensors[f"{name}.trained_module.{key}"] = value
    return tensors


def capture(
    wrapped: WrappedModel, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """Tensors of a checkpoint: adapter, optimizer, and every process's random state.

    What the processes share out is not gathered yet.

    Collective: every process must call it.
    """
    generators: dict[str, Tensor] = {}
    states_here = _random_states(_device(wrapped))
    for number, states in enumerate(processes.gather(states_here)):
        generators.update({f"{number}|{key}": value for key, value in states.items()})
    return {
        "adapter": adapter_tensors(wrapped),
        "optimizer": optimizer_tensors(optimizer, wrapped.model),
        "rng": generators,
    }


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Optimizer state as ``parameter name|state name`` to tensor."""
    return {
        f"{name}|{key}": torch.as_tensor(value)
        for name, parameter in trainable_parameters(model)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _device(wrapped: WrappedModel) -> torch.device:
    return next(wrapped.model.parameters()).device


def restore(
    wrapped: WrappedModel, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint
) -> Progress:
    """Put a checkpoint's state into model, optimizer and generators; return where it stands.

    Raises:
        CheckpointError: if its tensors are not this model's.
    """
    load_adapter_state(wrapped, checkpoint)
    try:
        load_optimizer_tensors(optimizer, wrapped.model, checkpoint.tensors["optimizer"])
    except KeyError as error:
        raise CheckpointError(
            f"the optimizer state does not fit: {error}", where=str(checkpoint.path)
        ) from error
    _restore_random(checkpoint.tensors.get("rng", {}), _device(wrapped))
    return Progress(**checkpoint.state)


@torch.no_grad()
def load_adapter_state(wrapped: WrappedModel, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's adapter into the model.

    Raises:
        CheckpointError: if a tensor is missing, unexpected or misshapen.
    """
    own, saved = adapter_tensors(wrapped), checkpoint.tensors.get("adapter", {})
    if own.keys() != saved.keys():
        names = sorted(own.keys() ^ saved.keys())
        raise CheckpointError(
            f"adapter tensors differ: {', '.join(names[:3])}", where=str(checkpoint.path)
        )
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise CheckpointError(
                f"tensor '{name}' has shape {list(saved[name].shape)} instead of "
                f"{list(tensor.shape)}",
                where=str(checkpoint.path),
            )
        own_part(tensor).copy_(part_of(saved[name], tensor))


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of ``optimizer_tensors``; tensors move to their parameter's device.

    Of what is shared out, each process takes its own rows.
    """
    parameters = dict(trainable_parameters(model))
    fused = {p for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    optimizer.state.clear()
    for key, tensor in tensors.items():
        name, _, state_name = key.rpartition("|")
        parameter = parameters[name]
        # The step counter stays on the CPU unless the kernel is fused: every step reads it.
        stays = tensor.dim() == 0 and parameter not in fused
        own = part_of(tensor, parameter) if tensor.dim() else tensor
        moved = own.clone() if stays else own.to(parameter.device, copy=True)
        if own.dim() and is_shared_out(parameter):
            moved = shared_out_as(moved, parameter)
        optimizer.state[parameter][state_name] = moved


def _restore_random(states: Mapping[str, Tensor], device: torch.device) -> None:
    prefix = f"{processes.rank()}|"
    if prefix + "torch" in states:
        torch.set_rng_state(states[prefix + "torch"])
    if prefix + "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states[prefix + "cuda"], device)


def seed_everything(seed: int) -> None:
    """Seed every generator; each process its own, so that dropout masks differ."""
    random.seed(seed + processes.rank())
    torch.manual_seed(seed + processes.rank())
