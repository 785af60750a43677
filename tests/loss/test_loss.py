"""The supervised-rows loss against plain cross-entropy of the full logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loratune.loss.constants import IGNORED
from loratune.loss.supervised import causal_targets, supervised_loss

ROWS, WIDTH, VOCABULARY = 11, 6, 17
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def frozen_head(bias: bool, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(False)


def draw(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(ROWS, WIDTH, dtype=dtype).requires_grad_()
    return hidden, torch.randint(VOCABULARY, (ROWS,))


def plain_loss(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100, None])
@pytest.mark.parametrize("trained", [False, True])
def test_loss_and_gradients_equal_plain_cross_entropy(
    dtype: torch.dtype, bias: bool, chunk_size: int | None, trained: bool
) -> None:
    torch.manual_seed(0)
    head = frozen_head(bias, dtype).requires_grad_(trained)
    hidden, targets = draw(dtype)
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    result = supervised_loss(hidden, head, targets, chunk_size=chunk_size)
    expected = plain_loss(hidden, head, targets)
    tol = TOLERANCE[dtype]
    assert result.total.dtype == expected.dtype
    torch.testing.assert_close(result.total, expected, rtol=tol, atol=tol)
    got = torch.autograd.grad(result.total / ROWS, inputs)
    want = torch.autograd.grad(expected / ROWS, inputs)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=tol, atol=tol)


@pytest.mark.parametrize("trained", [False, True])
def test_evaluation_counts_tokens_and_correct_predictions(trained: bool) -> None:
    torch.manual_seed(0)
    head = frozen_head(True, torch.float32).requires_grad_(trained)
    hidden, targets = draw(torch.float32)
    targets[::2] = head(hidden).argmax(-1)[::2]
    with torch.no_grad():
        result = supervised_loss(hidden, head, targets, chunk_size=3, count_correct=True)
    assert not result.total.requires_grad
    assert result.tokens == ROWS
    assert result.correct is not None
    assert int(result.correct) == int((head(hidden).argmax(-1) == targets).sum()) >= 6


@pytest.mark.parametrize("trained", [False, True])
def test_every_tokens_own_loss_is_kept_where_it_is_asked_for(trained: bool) -> None:
    head = frozen_head(True, torch.float32).requires_grad_(trained)
    hidden, targets = draw(torch.float32)
    result = supervised_loss(hidden, head, targets, chunk_size=3, keep_each=True)
    expected = F.cross_entropy(head(hidden), targets, reduction="none")
    assert result.each is not None and not result.each.requires_grad
    torch.testing.assert_close(result.each, expected.detach())
    plain = supervised_loss(hidden, head, targets, chunk_size=3)
    assert plain.each is None
    torch.testing.assert_close(result.total, plain.total)
    [got] = torch.autograd.grad(result.total, [hidden])
    [want] = torch.autograd.grad(expected.sum(), [hidden])
    torch.testing.assert_close(got, want)


def test_a_confident_prediction_keeps_a_precise_gradient_in_half_precision() -> None:
    head = frozen_head(False, torch.bfloat16)
    head.weight.zero_()
    head.weight[3, 0] = 1.0
    hidden = torch.zeros(1, WIDTH, dtype=torch.bfloat16)
    hidden[0, 0] = 10.0
    hidden.requires_grad_()
    supervised_loss(hidden, head, torch.tensor([3])).total.backward()
    exact = torch.softmax(torch.tensor([10.0] + [0.0] * (VOCABULARY - 1)), 0)[0] - 1
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[0, 0].float(), exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("trained", [False, True])
def test_no_supervised_row_gives_loss_zero_and_gradient_zero(trained: bool) -> None:
    head = frozen_head(True, torch.float32).requires_grad_(trained)
    hidden = torch.randn(4, WIDTH).requires_grad_()
    result = supervised_loss(hidden[:0], head, torch.empty(0, dtype=torch.int64))
    result.total.backward()
    assert result.total.item() == 0.0 and result.tokens == 0
    assert hidden.grad is not None and not hidden.grad.any()


def test_full_logits_never_exist_while_the_head_is_frozen() -> None:
    head = frozen_head(False, torch.float32)
    hidden, targets = draw(torch.float32)
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        supervised_loss(hidden, head, targets, chunk_size=4)
    assert saved == [(ROWS, WIDTH)]


def test_position_t_predicts_label_t_plus_one() -> None:
    labels = torch.tensor([[5, IGNORED, 7, 8], [IGNORED, IGNORED, 2, IGNORED]])
    rows, tokens = causal_targets(labels)
    assert rows.tolist() == [1, 2, 5]
    assert tokens.tolist() == [7, 8, 2]


@pytest.mark.parametrize("length", [1, 2, 9])
def test_causal_targets_match_the_shift_of_transformers(length: int) -> None:
    torch.manual_seed(length)
    labels = torch.randint(VOCABULARY, (3, length))
    labels[torch.rand(3, length) < 0.4] = IGNORED
    logits = torch.randn(3, length, VOCABULARY)
    rows, tokens = causal_targets(labels)
    shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].reshape(-1)
    expected = F.cross_entropy(logits.view(-1, VOCABULARY), shifted, reduction="sum")
    actual = F.cross_entropy(logits.view(-1, VOCABULARY)[rows], tokens, reduction="sum")
    torch.testing.assert_close(actual, expected)
