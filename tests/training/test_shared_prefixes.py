"""Computing what rows share once changes neither the loss nor any gradient."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import FAMILIES, VOCABULARY, tiny_llama, tiny_mistral
from support.variants import adapts, ranked
from torch import Tensor

import loratune
from loratune.adapters.registry import variant_names
from loratune.data.arrangement import Arrangement
from loratune.data.encoded_rows import EncodedRow
from loratune.loss.causal_model import LanguageModelHead
from loratune.training.forward import batch_loss, checkpoint_activations
from loratune.training.step import train_step


def chat_rows() -> list[EncodedRow]:
    """A common beginning, two instructions, answers that part at their first token or later."""
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=draw).tolist()

    system, asks = ids(12), [ids(7), ids(3)]
    answers = [[5, 6, 7, 1], [5, 6, 8, 9, 1], [9, 1], [5, 1]]
    rows = []
    for ask in asks:
        for answer in answers:
            whole = [*system, *ask, *answer]
            start = len(whole) - len(answer)
            rows.append(EncodedRow(whole, ((start, len(whole)),), start, f"rows:{len(rows)}"))
    rows.append(EncodedRow(system[:5], ((1, 5),), 1, "rows:8"))  # a beginning of all the others
    rows.append(rows[0])  # and the same row twice
    return rows


ARRANGEMENTS = {
    "shared": Arrangement(1, share="always"),
    "shared and packed": Arrangement(1, packed=40, share="always"),
    "auto": Arrangement(1, share="auto"),
}


def gradients(model: torch.nn.Module, arrangement: Arrangement) -> tuple[float, list[Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = batch_loss(LanguageModelHead(model), arrangement.batch(chat_rows())).total
    loss.backward()
    return float(loss.detach()), [p.grad for p in model.parameters() if p.grad is not None]


def moved(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def assert_same(model: torch.nn.Module, arrangement: Arrangement) -> None:
    loss, plain = gradients(model, Arrangement(1))
    shared_loss, shared = gradients(model, arrangement)
    assert shared_loss == pytest.approx(loss, rel=1e-6)
    assert len(plain) == len(shared) > 0
    for one, other in zip(plain, shared, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("name", ARRANGEMENTS)
@pytest.mark.parametrize(
    ("family", "variant"),
    [(f, v) for f in FAMILIES for v in variant_names() if adapts(v, f)],
)
def test_loss_and_every_gradient_are_the_single_rows(family: str, variant: str, name: str) -> None:
    wrapped = loratune.wrap(FAMILIES[family](), variant, targets="all-linear", **ranked(variant, 4))
    assert ARRANGEMENTS[name].batch(chat_rows()).computed < 0.6 * sum(map(len, chat_rows()))
    assert_same(moved(wrapped.model), ARRANGEMENTS[name])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_a_window_shorter_than_the_rows_is_kept(name: str, attention: str) -> None:
    model = tiny_mistral(sliding_window=6, attn_implementation=attention)
    wrapped = loratune.wrap(model, "lora", targets="all-linear", rank=4)
    assert_same(moved(wrapped.model), ARRANGEMENTS[name])


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_recomputed_blocks_keep_the_masks(name: str) -> None:
    wrapped = loratune.wrap(tiny_llama(), "lora", targets="all-linear", rank=4)
    model = moved(wrapped.model)
    loss, plain = gradients(model, Arrangement(1))
    checkpoint_activations(model)
    again, checkpointed = gradients(model, ARRANGEMENTS[name])
    assert again == pytest.approx(loss, rel=1e-6)
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


def test_accumulation_over_shared_micro_batches_is_one_step() -> None:
    def after(parts: int) -> list[Tensor]:
        wrapped = loratune.wrap(tiny_llama(), "lora", targets="all-linear", rank=4)
        optimizer = loratune.optimizer(wrapped, lr=1e-2)
        rows, arrangement = chat_rows(), ARRANGEMENTS["shared"]
        size = len(rows) // parts
        batches = [arrangement.batch(rows[n : n + size]) for n in range(0, len(rows), size)]
        moved(wrapped.model)
        metrics = train_step(LanguageModelHead(wrapped.model), batches, optimizer, 1.0, 0)
        assert metrics.tokens == sum(map(len, rows)) > metrics.padded
        return [p.detach() for p in wrapped.model.parameters() if p.requires_grad]

    for one, other in zip(after(1), after(5), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
