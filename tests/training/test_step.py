"""One optimizer step: token-weighted accumulation, divergence, the right labels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_models import VOCABULARY, tiny_opt
from torch import Tensor
from torch.nn import functional as F

import loratune
from loratune.config.schema import TrainerConfig
from loratune.data.arrangement import Arrangement
from loratune.data.collate import Batch, collate
from loratune.data.encoded_rows import EncodedRow
from loratune.errors import TrainingError
from loratune.loss.causal_model import LanguageModelHead
from loratune.training.forward import batch_loss
from loratune.training.optim import make_optimizer
from loratune.training.step import StepMetrics, train_step


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


SOURCES = ("task", "general", "unseen")


def mixed_rows() -> list[EncodedRow]:
    names = ("task", "general", "general", "task", "task", "general", "task", "task")
    made = [replace(row, origin=name) for row, name in zip(rows(), names, strict=True)]
    # General text is supervised from its first token that anything predicts.
    return [
        replace(row, spans=((1, len(row)),)) if row.origin == "general" else row for row in made
    ]


def step_of(head: LanguageModelHead, batches: list[Batch], sources: tuple[str, ...]) -> StepMetrics:
    trained = [p for p in head.parameters() if p.requires_grad]
    return train_step(head, batches, torch.optim.SGD(trained, lr=0.0), 0.0, 0, sources=sources)


@pytest.mark.parametrize("kind", ["padded", "packed", "shared", "accumulated"])
@pytest.mark.parametrize("split", [True, False])
def test_the_loss_of_each_source_is_the_mean_over_its_own_supervised_tokens(
    kind: str, split: bool
) -> None:
    made, model = mixed_rows(), opt()
    losses: dict[str, list[Tensor]] = {"task": [], "general": []}
    for row in made:
        logits = model(torch.tensor([row.input_ids])).logits[0].detach()
        each = F.cross_entropy(logits[:-1], torch.tensor(row.labels[1:]), reduction="none")
        losses[row.origin].append(each[torch.tensor(row.labels[1:]) != -100])
    batches = {
        "padded": [collate(made, 1, range(8), SOURCES)],
        "packed": [Arrangement(1, packed=24).batch(made, range(8), SOURCES)],
        "shared": [Arrangement(1, share="always").batch(made, range(8), SOURCES)],
        "accumulated": [collate(made[i : i + 3], 1, (), SOURCES) for i in range(0, 8, 3)],
    }[kind]
    wrapped = loratune.wrap(opt(), "lora", targets="all-linear", rank=4)
    head = LanguageModelHead(wrapped.model)
    assert head.split is not None
    head.split = head.split if split else None
    metrics = step_of(head, batches, SOURCES)
    expected = {name: float(torch.cat(parts).mean()) for name, parts in losses.items()}
    assert metrics.source_losses == pytest.approx(expected, rel=1e-5)
    tokens = {name: sum(map(len, parts)) for name, parts in losses.items()}
    weighted = sum(metrics.source_losses[name] * count for name, count in tokens.items())
    assert weighted / metrics.supervised == pytest.approx(metrics.loss, rel=1e-6)


def test_sources_change_neither_loss_nor_gradient_and_cost_no_further_wait_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[str] = []
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "nonzero"):
        original = getattr(Tensor, name)

        def counted(*arguments, original=original, name=name, **options):
            reads.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(Tensor, name, counted)
    seen = []
    for names in ((), SOURCES):
        wrapped = loratune.wrap(opt(), "lora", targets="all-linear", rank=4, seed=0)
        head = LanguageModelHead(wrapped.model)
        batches = [collate(mixed_rows()[i : i + 4], 1, (), names) for i in (0, 4)]
        reads.clear()
        metrics = step_of(head, batches, names)
        waits = len(reads)
        grads = [p.grad for p in wrapped.model.parameters() if p.grad is not None]
        seen.append((metrics.loss, waits, grads))
    assert seen[0][:2] == seen[1][:2]
    assert seen[0][1] > 0, "nothing was counted"
    assert all(torch.equal(a, b) for a, b in zip(seen[0][2], seen[1][2], strict=True))
