"""Taking causal language models apart: exact where it is done, refused where it is not."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import (
    VOCABULARY,
    tiny_cohere,
    tiny_gemma2,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
)
from torch import Tensor, nn
from torch.nn import functional as F

from loratune.loss.causal_model import LanguageModelHead, backbone_and_head
from loratune.loss.constants import IGNORED
from loratune.loss.supervised import causal_targets

SPLIT = {
    "opt": tiny_opt,
    "opt with projected embeddings": lambda: tiny_opt(word_embed_proj_dim=8),
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "gemma2 without soft-capping": lambda: tiny_gemma2(final_logit_softcapping=None),
}
WHOLE = {
    "gemma2, soft-capped": lambda: tiny_gemma2(final_logit_softcapping=30.0),
    "cohere, scaled": tiny_cohere,
}


def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    input_ids = torch.randint(1, VOCABULARY, (3, 7))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 4:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
    labels[:, :2] = IGNORED
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def plain(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED).reshape(-1)
    logits = model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
    ).logits.view(-1, VOCABULARY)
    hits = (logits.argmax(-1) == labels).sum()
    return F.cross_entropy(logits, labels, reduction="sum"), int(hits)


@pytest.mark.parametrize("name", [*SPLIT, *WHOLE])
def test_loss_count_and_gradients_are_the_whole_models(name: str) -> None:
    torch.manual_seed(1)
    model = (SPLIT | WHOLE)[name]().double().eval()
    head = LanguageModelHead(model, chunk_size=4)
    assert (head.split is not None) == (name in SPLIT)
    inputs = batch()
    expected, hits = plain(model, inputs)
    result = head(
        inputs["input_ids"],
        causal_targets(inputs["labels"]),
        attention_mask=inputs["attention_mask"],
        count_correct=True,
    )
    assert result.tokens == int((inputs["labels"][:, 1:] != IGNORED).sum())
    assert int(result.correct) == hits
    torch.testing.assert_close(result.total, expected, rtol=1e-12, atol=1e-12)
    parameters = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(result.total, parameters, allow_unused=True)
    want = torch.autograd.grad(expected, parameters, allow_unused=True)
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_parts_are_not_registered_twice_and_modes_survive_the_probe() -> None:
    model = tiny_opt().train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    head = LanguageModelHead(model)
    assert [module.training for module in model.modules()] == modes
    assert {name.removeprefix("model.") for name, _ in head.named_parameters()} == {
        name for name, _ in model.named_parameters()
    }
    assert not model.lm_head._forward_hooks


def test_a_model_without_a_head_is_not_taken_apart() -> None:
    assert backbone_and_head(nn.Linear(2, 2)) is None
    assert backbone_and_head(tiny_opt().model) is None
