"""One optimizer step: the only place that computes and applies gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loratune.data.collate import Batch
from loratune.errors import TrainingError
from loratune.loss.causal_model import LanguageModelHead
from loratune.runs import processes
from loratune.runs.sharded import anywhere, is_shared_out, own_part
from loratune.training.determinism import repeatable_kernels
from loratune.training.forward import batch_loss, source_sums


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured, over all processes.

    Attributes:
        step: number of the step, from 1.
        loss: mean over the step's supervised tokens.
        grad_norm: Euclidean norm of the gradient before clipping.
        supervised: supervised tokens.
        tokens: tokens of the rows, without padding.
        padded: tokens computed: with padding, and what rows share once.
        seconds: from the step's begin to its end, the wait for its rows among them.
        source_losses: mixtures only: name of every source in the step to its own mean loss.
    """

    step: int
    loss: float
    grad_norm: float
    supervised: int
    tokens: int
    padded: int
    seconds: float = 0.0
    source_losses: Mapping[str, float] = field(default_factory=dict)


def train_step(
    head: LanguageModelHead,
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    clip_norm: float,
    step: int,
    source_of: Callable[[int], str] = str,
    sources: Sequence[str] = (),
    *,
    deterministic: bool = True,
) -> StepMetrics:
    """Accumulate token-weighted gradients over the micro-batches and apply them once.

    Every supervised token weighs the same, however the rows are split over micro-batches and
    processes: 4 micro-batches of 2 rows equal 1 of 8.

    Args:
        head: the model, giving summed losses.
        micro_batches: this process's share, on the model's device; may be empty.
        optimizer: over what trains.
        clip_norm: largest gradient norm, 0 for none.
        step: optimizer step, from 0, for messages.
        source_of: row number to ``file:line``, for messages.
        sources: names of a mixture's sources, to measure each one's loss.
        deterministic: whether gradients must be the same to the bit every time.

    Raises:
        TrainingError: if the loss or a gradient is NaN or infinite; nothing was applied.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    counts = _counts(micro_batches, len(sources))
    supervised, tokens, padded, *source_tokens = processes.total(counts, device)
    optimizer.zero_grad(set_to_none=True)
    # ---- forward and backward, one micro-batch at a time ----
    # The loss, then that of every source: read together, so that sources cost no second wait.
    sums = torch.zeros(1 + len(sources), dtype=torch.float64, device=device)
    kernels = partial(repeatable_kernels, device) if deterministic else nullcontext
    for batch in micro_batches:
        if batch.supervised or batch.is_idle:
            sums += _backward(head, batch, supervised, kernels)
    # ---- sum over processes, look, clip, apply ----
    whole, shared_out = _by_place(parameters)
    processes.sum_gradients(whole)
    norm = _total_norm(whole, shared_out)
    # ---- one copy from the device: what a step waits for, with the norm of shared-out parts ----
    *own_sums, size = torch.cat([sums, norm.to(sums)[None]]).tolist()
    summed, *source_sum = processes.total(own_sums, device)
    mean = summed / supervised
    if not (math.isfinite(mean) and math.isfinite(size)):
        rows = [source_of(row) for batch in micro_batches for row in batch.row_ids]
        raise _divergence(head.model, mean, f"step {step + 1}, rows {', '.join(rows)}")
    if clip_norm:
        _clip(whole, shared_out, clip_norm, norm)
    optimizer.step()
    parts = zip(sources, source_sum, source_tokens, strict=True)
    return StepMetrics(
        step + 1,
        mean,
        size,
        int(supervised),
        int(tokens),
        int(padded),
        source_losses={name: part / count for name, part, count in parts if count},
    )


def _by_place(
    parameters: Sequence[nn.Parameter],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is whole on every process, and what each holds some rows of: their gradients too."""
    whole = [p for p in parameters if not is_shared_out(p)]
    return whole, [p for p in parameters if is_shared_out(p)]


def _own_gradients(shared_out: Sequence[nn.Parameter]) -> list[Tensor]:
    return [own_part(p.grad) for p in shared_out if p.grad is not None]


def _total_norm(whole: Sequence[nn.Parameter], shared_out: Sequence[nn.Parameter]) -> Tensor:
    """Norm of all gradients, the same number on every process."""
    norm = nn.utils.get_total_norm([p.grad for p in whole if p.grad is not None])
    if not shared_out:
        return norm
    own = nn.utils.get_total_norm(_own_gradients(shared_out)).double().square()
    device = shared_out[0].device
    (others,) = processes.total([float(own)], device)
    return (norm.to(device).double().square() + others).sqrt().float()


def _clip(
    whole: Sequence[nn.Parameter],
    shared_out: Sequence[nn.Parameter],
    clip_norm: float,
    norm: Tensor,
) -> None:
    """Scale all gradients alike where their norm is above ``clip_norm``."""
    nn.utils.clip_grads_with_norm_(whole, clip_norm, norm)
    own = _own_gradients(shared_out)
    if own:  # the same factor as torch takes
        torch._foreach_mul_(own, torch.clamp(clip_norm / (norm + 1e-6), max=1.0))


def _counts(micro_batches: Sequence[Batch], sources: int) -> list[float]:
    """Supervised tokens, tokens of rows, tokens computed, and supervised ones of each source."""
    return [
        float(sum(batch.supervised for batch in micro_batches)),
        float(sum(batch.tokens for batch in micro_batches)),
        float(sum(batch.computed for batch in micro_batches)),
        *(float(sum(batch.source_tokens[n] for batch in micro_batches)) for n in range(sources)),
    ]


def _backward(
    head: LanguageModelHead,
    batch: Batch,
    supervised: float,
    kernels: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """Add a micro-batch's gradients; returns its summed loss, then each source's part of it."""
    loss = batch_loss(head, batch)
    summed: Any = loss.total
    if loss.routers is not None:  # a mean already: weighted by the batch's share of tokens
        summed = summed + loss.routers * batch.supervised
    with kernels():
        (summed / supervised).backward()
    total = loss.total.detach().double()[None]
    return total if batch.sources is None else torch.cat([total, source_sums(loss, batch)])


def _divergence(model: nn.Module, loss: float, where: str) -> TrainingError:
    """What is not finite, and where; collective, since each process may hold another part."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    values = anywhere(name for name, p in trained if not _finite(p))
    gradients = anywhere(name for name, p in trained if p.grad is not None and not _finite(p.grad))
    quantity = f"the loss is {loss}{_largest(trained)}"
    if values:
        quantity = f"parameter {values[0]} is not finite"
    elif math.isfinite(loss) and gradients:
        quantity = f"the gradient of {gradients[0]} is not finite"
    fix = "lower trainer.lr or set trainer.clip_norm; the last checkpoint is finite"
    if where.startswith("step 1,") and not values:
        fix = "nothing was trained yet: the base model itself gives this on these rows"
    return TrainingError(f"training diverged: {quantity}", where=where, fix=fix)


def _largest(trained: Sequence[tuple[str, Tensor]]) -> str:
    parts = {name: own_part(parameter.detach()) for name, parameter in trained}
    own = [(float(part.abs().max()), name) for name, part in parts.items() if part.numel()]
    largest = max(own, key=lambda one: one[0], default=(-1.0, ""))  # it may hold no rows at all
    size, name = max(processes.gather(largest), key=lambda one: one[0])
    return f" (largest trained value: {size:.3g} in {name})"


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(own_part(tensor)).all())
