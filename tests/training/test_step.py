"""One optimizer step: token-weighted accumulation, divergence, the right labels."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import VOCABULARY, tiny_opt
from torch.nn import functional as F

import loratune
from loratune.config.schema import TrainerConfig
from loratune.data.arrangement import Arrangement
from loratune.data.collate import collate
from loratune.data.encoded_rows import EncodedRow
from loratune.errors import TrainingError
from loratune.loss.causal_model import LanguageModelHead
from loratune.training.forward import batch_loss
from loratune.training.optim import make_optimizer
from loratune.training.step import train_step


def opt(attention: str = "sdpa"):
    return tiny_opt(attn_implementation=attention).eval()


def rows(count: int = 8, seed: int = 0) -> list[EncodedRow]:
    """Rows of unlike length, each with a prompt that is not supervised and an answer that is."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = 5 + (number * 3) % 7
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        made.append(EncodedRow(ids, ((2 + number % 2, length),), 2, f"rows.jsonl:{number + 1}"))
    return made


def stepped(micro_batches, **settings):
    wrapped = loratune.wrap(opt(), "lora", targets="all-linear", rank=4, **settings)
    torch.manual_seed(1)
    for adapter in wrapped.adapters.values():
        torch.nn.init.normal_(adapter.lora_B, std=0.1)
    optimizer = make_optimizer(wrapped.model, wrapped.config, TrainerConfig(lr=1e-2))
    head = LanguageModelHead(wrapped.model)
    metrics = train_step(head, micro_batches, optimizer, 1.0, 0)
    return wrapped, metrics


def test_eight_rows_at_once_equal_four_micro_batches_of_two() -> None:
    made = rows()
    whole, one = stepped([collate(made, 1, range(8))])
    parts, four = stepped([collate(made[i : i + 2], 1, range(i, i + 2)) for i in range(0, 8, 2)])
    assert one.supervised == four.supervised == sum(row.supervised for row in made)
    assert one.loss == pytest.approx(four.loss, rel=1e-6)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_loss_is_the_mean_over_supervised_tokens_of_the_plain_model() -> None:
    made = rows()
    model = opt()
    total, count = 0.0, 0
    for row in made:
        logits = model(torch.tensor([row.input_ids])).logits[0].detach()
        for place in range(1, len(row)):
            if row.labels[place] != -100:
                total += float(F.cross_entropy(logits[place - 1], torch.tensor(row.labels[place])))
                count += 1
    wrapped = loratune.wrap(opt(), "lora", targets="all-linear", rank=4)
    optimizer = make_optimizer(wrapped.model, wrapped.config, TrainerConfig(lr=1e-2))
    batch = collate(made, 1, range(8))
    metrics = train_step(LanguageModelHead(wrapped.model), [batch], optimizer, 0.0, 0)
    assert metrics.loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_loss_of_unpacked_rows(attention: str) -> None:
    made = rows()
    head = LanguageModelHead(opt(attention))
    apart = batch_loss(head, collate(made, 1, range(8)))
    packed = batch_loss(head, Arrangement(1, packed=24).batch(made, range(8)))
    assert packed.tokens == apart.tokens
    assert float(packed.total.detach()) == pytest.approx(float(apart.total.detach()), rel=1e-5)


def test_a_diverged_step_names_step_tensor_and_rows_and_applies_nothing() -> None:
    made = rows()
    wrapped = loratune.wrap(opt(), "lora", targets="all-linear", rank=4)
    optimizer = make_optimizer(wrapped.model, wrapped.config, TrainerConfig(lr=1e-2))
    broken = next(iter(wrapped.adapters.values()))
    with torch.no_grad():
        broken.lora_B[0, 0] = float("nan")
    before = broken.lora_A.clone()
    batch = collate(made[:2], 1, [0, 1])
    with pytest.raises(TrainingError) as caught:
        train_step(
            LanguageModelHead(wrapped.model), [batch], optimizer, 1.0, 6, lambda n: made[n].source
        )
    assert "lora_B" in caught.value.cause
    assert "step 7" in caught.value.where and "rows.jsonl:2" in caught.value.where
    assert torch.equal(broken.lora_A, before)


def test_clipping_limits_the_norm_that_is_applied() -> None:
    made = rows()
    wrapped = loratune.wrap(opt(), "lora", targets="all-linear", rank=4)
    torch.manual_seed(1)
    for adapter in wrapped.adapters.values():
        torch.nn.init.normal_(adapter.lora_B)
    parameters = [p for p in wrapped.model.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(parameters, lr=1.0)
    before = [p.detach().clone() for p in parameters]
    metrics = train_step(
        LanguageModelHead(wrapped.model), [collate(made, 1, range(8))], sgd, 0.25, 0
    )
    moved = torch.cat([(p - b).flatten() for p, b in zip(parameters, before, strict=True)])
    assert metrics.grad_norm > 0.25
    assert float(moved.detach().norm()) == pytest.approx(0.25, rel=1e-3)
