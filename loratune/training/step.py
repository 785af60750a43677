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
    processes.sum_gradients(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # ---- one copy from the device: the only time that a step waits for it ----
    *own_sums, size = torch.cat([sums, norm.to(sums)[None]]).tolist()
    whole, *source_sum = processes.total(own_sums, device)
    mean = whole / supervised
    if not (math.isfinite(mean) and math.isfinite(size)):
        rows = [source_of(row) for batch in micro_batches for row in batch.row_ids]
        raise _divergence(head.model, mean, f"step {step + 1}, rows {', '.join(rows)}")
    if clip_norm:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
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
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    values = [name for name, p in trained if not _finite(p)]
    gradients = [name for name, p in trained if p.grad is not None and not _finite(p.grad)]
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
    sizes = {name: float(parameter.detach().abs().max()) for name, parameter in trained}
    name = max(sizes, key=sizes.__getitem__)
    return f" (largest trained value: {sizes[name]:.3g} in {name})"


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
