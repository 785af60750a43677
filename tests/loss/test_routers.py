"""The loss of a mixture's routers, against the one that transformers adds itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.families import BUILDERS
from support.tiny_models import tiny_llama
from torch import Tensor

from loratune.adapters.registry import config_class
from loratune.config.schema import DataConfig, RunConfig, TargetsConfig, TrainerConfig
from loratune.data.arrangement import arrange
from loratune.data.collate import Batch, collate
from loratune.data.encoded_rows import EncodedRow
from loratune.errors import ConfigError
from loratune.loss.causal_model import LanguageModelHead
from loratune.loss.constants import IGNORED
from loratune.loss.routers import router_coefficient
from loratune.surgery import wrap_model
from loratune.training.forward import batch_loss
from loratune.training.step import train_step

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "jetmoe")
LENGTHS = (9, 5)


def rows() -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, 90, (length,), generator=generator).tolist()
        made.append(EncodedRow(ids, ((2, length),), 2, "row"))
    return made


def adapted(family: str) -> Any:
    model = BUILDERS[family]().train()
    config = config_class("lora")(rank=2, init="random")
    return wrap_model(model, config, TargetsConfig(modules="all_linear")).model


def theirs(model: Any, batch: Batch) -> Tensor:
    """The loss that transformers computes with labels, padding masked."""
    labels = [torch.tensor(row.labels) for row in rows()]
    padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    loss: Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.not_padding.long(),
        labels=padded,
        output_router_logits=True,
        use_cache=False,
    ).loss
    return loss


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradients_are_those_of_transformers(family: str) -> None:
    model, batch = adapted(family), collate(rows(), pad_id=0)
    head = LanguageModelHead(model, router_loss=True)
    ours = batch_loss(head, batch)
    assert ours.routers is not None and float(ours.routers.detach()) > 0
    total = ours.total / batch.supervised + ours.routers
    expected = theirs(model, batch)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    own, other = (
        torch.autograd.grad(loss, trained, allow_unused=True) for loss in (total, expected)
    )
    for mine, reference in zip(own, other, strict=True):
        assert (mine is None) == (reference is None)
        if mine is not None and reference is not None:
            torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-6)


def test_a_step_follows_both_losses_and_reports_that_of_the_tokens() -> None:
    batch = collate(rows(), pad_id=0)
    model = adapted("mixtral")
    trained = [p for p in model.parameters() if p.requires_grad]
    theirs(model, batch).backward()
    expected = [p.grad.clone() for p in trained if p.grad is not None]
    plain = batch_loss(LanguageModelHead(model), batch)
    optimizer = torch.optim.SGD(trained, lr=0.0)
    metrics = train_step(LanguageModelHead(model, router_loss=True), [batch], optimizer, 0.0, 0)
    assert metrics.loss == pytest.approx(float(plain.total.detach()) / batch.supervised, rel=1e-6)
    got = [p.grad for p in trained if p.grad is not None]
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-6)


def test_without_gradients_the_loss_is_the_tokens_alone() -> None:
    head = LanguageModelHead(adapted("mixtral"), router_loss=True)
    with torch.no_grad():
        assert batch_loss(head, collate(rows(), pad_id=0)).routers is None


def test_a_model_without_such_a_loss_is_refused_by_the_setting() -> None:
    for model in (tiny_llama(), BUILDERS["deepseek_v3"]()):
        assert router_coefficient(model) == 0
        with pytest.raises(ConfigError, match="no load-balancing loss") as caught:
            LanguageModelHead(model, router_loss=True)
        assert caught.value.where == "trainer.router_loss=true"


@pytest.mark.parametrize("key", ["packing", "share_prefixes"])
def test_rows_that_lie_together_are_refused(key: str) -> None:
    config = RunConfig(data=DataConfig(**{key: True}), trainer=TrainerConfig(router_loss=True))
    with pytest.raises(ConfigError, match="single rows") as caught:
        arrange(config, BUILDERS["mixtral"](), 0, rows())
    assert caught.value.where == f"data.{key}=true"
    alone, _ = arrange(replace(config, data=DataConfig()), BUILDERS["mixtral"](), 0, rows())
    assert not alone.packed
