"""Next-token loss that costs only what is supervised.

The language-model head runs on the rows that have a target, a chunk at a time: neither the full
logits nor their gradient ever exist.  With a frozen head the gradient with respect to the hidden
states is ready at the end of the forward pass, and is all that is stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from loratune.loss.constants import CHUNK_LOGITS, IGNORED


class Targets(NamedTuple):
    """Flat positions b·T + t of a (B, T) batch, and the token that each must predict.

    A position may stand there several times: where rows part, it predicts a token of each.
    """

    rows: Tensor
    tokens: Tensor


class TokenLoss(NamedTuple):
    """Sum of token losses in nats (at least fp32), how many tokens, how many predicted right.

    ``each`` has the loss of every token, without a gradient, where the caller asked for it.
    ``routers`` is the load-balancing loss, a mean, with its coefficient; it is not in ``total``.
    """

    total: Tensor
    tokens: int
    correct: Tensor | None = None
    each: Tensor | None = None
    routers: Tensor | None = None


def causal_targets(labels: Tensor) -> Targets:
    """The positions whose *next* label is supervised: position t predicts label t + 1.

    Args:
        labels: (B, T) token ids, ``IGNORED`` where unsupervised; a row's first label, which
            nothing predicts, never counts.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)
    rows = torch.nonzero(following != IGNORED).squeeze(1)
    return Targets(rows, following[rows])


Parts = tuple[Tensor, Tensor, Tensor]
"""Sum of the losses, tokens predicted right, and each token's loss (empty if not wanted)."""
Wanted = tuple[bool, bool]
"""Whether tokens predicted right are counted, and whether each token's loss is kept."""


def supervised_loss(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    *,
    chunk_size: int | None = None,
    count_correct: bool = False,
    keep_each: bool = False,
) -> TokenLoss:
    """Cross-entropy of ``head(hidden)``, summed over the rows, without the full logits.

    Equals ``F.cross_entropy(head(hidden).float(), targets, reduction="sum")`` within rounding.

    Args:
        hidden: (N, d), only the supervised rows.
        head: (N, d) → (N, V); a frozen ``nn.Linear`` costs one pass, anything else (a trained
            head, an adapter) is recomputed chunk by chunk in the backward pass.
        targets: (N) token ids.
        chunk_size: rows at a time; by default as many as give ``CHUNK_LOGITS`` logits.
        count_correct: also count rows whose largest logit is the target's.
        keep_each: also keep every row's own loss.
    """
    loss = _hidden_loss if _is_frozen_linear(head) else _recomputed_loss
    rows = chunk_size or max(1, CHUNK_LOGITS // _vocabulary(head))
    parts = loss(hidden, head, targets, rows, (count_correct, keep_each))
    return _token_loss(parts, targets, count_correct, keep_each)


def logits_loss(
    logits: Tensor, targets: Tensor, *, count_correct: bool = False, keep_each: bool = False
) -> TokenLoss:
    """The same for logits (N, V) that exist already."""
    parts = _plain_loss(logits, targets, (count_correct, keep_each))
    return _token_loss(parts, targets, count_correct, keep_each)


def _token_loss(parts: Parts, targets: Tensor, count_correct: bool, keep_each: bool) -> TokenLoss:
    total, correct, each = parts
    return TokenLoss(
        total,
        targets.numel(),
        correct if count_correct else None,
        each if keep_each else None,
    )


def _is_frozen_linear(head: nn.Module) -> bool:
    # A hook on the head (an offloader's, say) would not run on the bare weight.
    hooked = bool(head._forward_hooks or head._forward_pre_hooks)
    frozen = not any(parameter.requires_grad for parameter in head.parameters())
    return type(head) is nn.Linear and frozen and not hooked


def _vocabulary(head: nn.Module) -> int:
    size = getattr(head, "out_features", None)
    return size if isinstance(size, int) else 1 << 17


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _plain_loss(logits: Tensor, targets: Tensor, wanted: Wanted) -> Parts:
    count_correct, keep_each = wanted
    correct = _correct(logits.detach(), targets, count_correct)
    if keep_each:
        each = F.cross_entropy(_widened(logits), targets, reduction="none")
        return each.sum(), correct, each.detach()
    loss = F.cross_entropy(_widened(logits), targets, reduction="sum")
    return loss, correct, loss.new_empty(0)


def _correct(logits: Tensor, targets: Tensor, wanted: bool) -> Tensor:
    hits = logits.argmax(-1) == targets if wanted else torch.zeros_like(targets)
    return hits.sum()


def _recomputed_loss(
    hidden: Tensor, head: nn.Module, targets: Tensor, chunk_size: int, wanted: Wanted
) -> Parts:
    def chunk_loss(rows: Tensor, tokens: Tensor) -> Parts:
        return _plain_loss(head(rows), tokens, wanted)

    # One chunk at least: an empty batch must still reach the head's parameters.
    chunks = zip(torch.split(hidden, chunk_size), torch.split(targets, chunk_size), strict=True)
    parts = [checkpoint(chunk_loss, rows, tokens, use_reentrant=False) for rows, tokens in chunks]
    totals, corrects, each = zip(*parts, strict=True)
    return torch.stack(totals).sum(), torch.stack(corrects).sum(), torch.cat(each)


def _hidden_loss(
    hidden: Tensor, head: nn.Module, targets: Tensor, chunk_size: int, wanted: Wanted
) -> Parts:
    weight, bias = head.weight, head.bias
    needs_gradient = torch.is_grad_enabled() and hidden.requires_grad
    result: Parts = _FrozenHeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, chunk_size, needs_gradient, wanted
    )
    return result


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_size: int,
        needs_gradient: bool,
        wanted: Wanted,
    ) -> Parts:
        count_correct, keep_each = wanted
        grad = torch.empty_like(hidden) if needs_gradient else None
        total = _widened(hidden.new_zeros(()))
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        each = total.new_empty(hidden.shape[0] if keep_each else 0)
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            logits = F.linear(hidden[rows], weight, bias)
            correct += _correct(logits, targets[rows], count_correct)
            log_p = F.log_softmax(_widened(logits), dim=-1)
            at_target = targets[rows].unsqueeze(1)
            predicted = log_p.gather(1, at_target)
            total -= predicted.sum()
            if keep_each:
                each[rows] = -predicted.squeeze(1)
            if grad is not None:
                # softmax - onehot, subtracted before any rounding to half precision.
                residual = log_p.exp_().scatter_add_(
                    1, at_target, log_p.new_full((), -1.0).expand_as(at_target)
                )
                grad[rows] = residual.to(logits.dtype) @ weight.to(logits.dtype)
            del logits, log_p
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(correct, each)
        return total, correct, each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_total.to(grad.dtype), None, None, None, None, None, None)
