"""Padding, packing and gradient checkpointing change the cost of a batch, never its loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_models import FAMILIES, VOCABULARY, tiny_llama
from support.variants import ranked
from transformers import GitConfig, GitForCausalLM

import loratune
from loratune.adapters.registry import variant_names
from loratune.data.arrangement import Arrangement
from loratune.data.collate import collate
from loratune.data.encoded_rows import EncodedRow
from loratune.loss.causal_model import LanguageModelHead
from loratune.loss.supervised import Targets
from loratune.training.forward import batch_loss, checkpoint_activations


def rows() -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(7):
        length = 4 + (number * 5) % 9
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        made.append(EncodedRow(ids, ((2, length),), 2, f"rows:{number}"))
    return made


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_packed_and_single_rows_have_the_same_loss(family: str, attention: str) -> None:
    head = LanguageModelHead(FAMILIES[family](attn_implementation=attention).eval())
    made = rows()
    with torch.no_grad():
        single = sum(float(batch_loss(head, collate([row], 1)).total) for row in made)
        padded = float(batch_loss(head, collate(made, 1)).total)
        packed = float(batch_loss(head, Arrangement(1, packed=20).batch(made)).total)
    assert padded == pytest.approx(single, rel=1e-5)
    assert packed == pytest.approx(single, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_cannot_see_its_neighbours(family: str) -> None:
    model = FAMILIES[family]().eval()
    head = LanguageModelHead(model)
    made = rows()
    together = Arrangement(1, packed=60)
    before = together.batch(made, range(len(made)))
    first = before.row_ids[0]
    changed = [
        row if number == first else EncodedRow([3] * len(row), row.spans, 2, row.source)
        for number, row in enumerate(made)
    ]
    after = together.batch(changed, range(len(made)))
    assert after.row_ids == before.row_ids
    losses = []
    with torch.no_grad():
        for batch in (before, after):
            own = batch.targets.rows < len(made[first])
            targets = Targets(batch.targets.rows[own], batch.targets.tokens[own])
            losses.append(batch_loss(head, replace(batch, targets=targets)).total)
    assert torch.equal(losses[0], losses[1])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("variant", variant_names())
def test_gradient_checkpointing_changes_no_gradient(variant: str, packing: bool) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        wrapped = loratune.wrap(tiny_llama(), variant, targets="all-linear", **ranked(variant, 4))
        model = wrapped.model.train()
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            checkpoint_activations(model)
        batch = Arrangement(1, packed=20).batch(rows()) if packing else collate(rows(), 1)
        batch_loss(LanguageModelHead(model), batch).total.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_leaves_embeddings_to_models_that_change_them_in_place() -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        config = GitConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                           "num_attention_heads": 2, "image_size": 32, "patch_size": 16},
        )  # fmt: skip
        wrapped = loratune.wrap(GitForCausalLM(config), targets=["query", "value"], rank=4)
        model = wrapped.model.train()
        for layer in wrapped.adapters.values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
        if checkpointing:
            checkpoint_activations(model)
        batch_loss(LanguageModelHead(model), collate(rows(), 1)).total.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", variant_names())
def test_a_bf16_base_keeps_fp32_adapters_and_learns(variant: str) -> None:
    model = tiny_llama().to(torch.bfloat16)
    wrapped = loratune.wrap(model, variant, targets="all-linear", **ranked(variant, 4))
    optimizer = loratune.optimizer(wrapped, lr=2e-2)
    head, batch = LanguageModelHead(model.train()), collate(rows(), 1)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = batch_loss(head, batch).total / batch.supervised
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.dtype is torch.float32 for p in model.parameters() if p.requires_grad)
    assert losses[-1] < losses[0]
