"""Where loratune and PEFT 0.21.2 differ on purpose: each test states both sides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.peft_oracle import (
    PEFT_ABOUT_ITSELF,
    lora_config,
    our_model,
    our_optimizer,
    our_parameters,
    peft_lora_tensors,
    peft_model,
    peft_parameters,
)
from support.tiny_models import EMBEDDING, FAMILIES, logits, tiny_gpt2, tiny_opt, token_ids
from support.tolerance import T0, T2, largest

from loratune.errors import ModelError
from loratune.surgery import merge_model

pytestmark = [
    *PEFT_ABOUT_ITSELF,
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings:UserWarning"),
]


@torch.no_grad()
def randomize(tensors: Any) -> None:
    """Give an adapter an effect, the same wherever its shapes are."""
    torch.manual_seed(3)
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape) * 0.3)


@pytest.mark.case(63, T2)
@pytest.mark.parametrize("family", ["opt", "gpt2"])
@pytest.mark.parametrize("ends", ["input", "output", "both"])
def test_merging_into_tied_embeddings_keeps_the_logits_here_and_not_in_peft(
    family: str, ends: str
) -> None:
    targets = {
        "input": [EMBEDDING[family]], "output": ["lm_head"], "both": [EMBEDDING[family], "lm_head"],
    }[ends]  # fmt: skip
    theirs = peft_model(
        FAMILIES[family](), lora_config(r=4, lora_alpha=8, target_modules=targets), 1
    )
    ours = our_model(FAMILIES[family](), "lora", targets, seed=1, rank=4, alpha=8.0)
    randomize(peft_lora_tensors(theirs).values())
    randomize(our_parameters(ours).values())
    adapted = logits(ours.model)
    T0.check(logits(theirs), adapted)
    plain = merge_model(ours)
    T2.check(logits(plain), adapted)
    assert plain.config.tie_word_embeddings is False
    head, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()  # type: ignore[operator]
    assert head.weight.data_ptr() != embedding.weight.data_ptr()
    assert largest(logits(theirs.merge_and_unload()), adapted) > 1.0


@pytest.mark.case(63, T2)
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_merging_tied_embeddings_in_place_changes_only_the_adapted_end(family: str) -> None:
    ours = our_model(FAMILIES[family](), "lora", [EMBEDDING[family]], seed=1, rank=4, alpha=8.0)
    randomize(our_parameters(ours).values())
    adapted, model = logits(ours.model), ours.model
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    before = head.weight.detach().clone()
    for layer in ours.adapters.values():
        layer.merge()
    T0.check(head.weight.detach(), before)
    T2.check(logits(model), adapted)
    for layer in ours.adapters.values():
        layer.unmerge()
    T0.check(logits(model), adapted)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    assert embedding.base_layer.weight is head.weight


@pytest.mark.case(38, T0)
def test_lora_fa_on_embeddings_is_refused_here_and_never_moves_in_peft(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.optimizers import create_lorafa_optimizer

    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    with pytest.raises(ModelError, match="LoRA-FA cannot adapt an embedding"):
        our_model(tiny_opt(), "lora_fa", ["embed_tokens"], rank=4)
    theirs = peft_model(
        tiny_opt(), lora_config(r=4, lora_alpha=4, target_modules=["embed_tokens"]), 1
    )
    optimizer = create_lorafa_optimizer(theirs, r=4, lora_alpha=4, lr=1e-1)
    before = logits(theirs)
    for step in range(3):
        train_step(theirs, optimizer, step)
    T0.check(logits(theirs), before)


def train_step(model: Any, optimizer: torch.optim.Optimizer, step: int = 0) -> None:
    model.train()
    optimizer.zero_grad(set_to_none=True)
    ids = token_ids(step)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()


def skip_first_block(model: Any) -> None:
    """Make the first block pass its input on: its adapters get no gradient."""

    class Passing(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return hidden_states

    for module in model.modules():
        if hasattr(module, "h") and hasattr(module, "wpe"):
            module.h[0] = Passing(module.h[0])
            return
    raise AssertionError("no blocks")


@pytest.mark.case(39, T0)
@pytest.mark.parametrize("kernel", ["reference", "fused"])
def test_modules_that_are_not_used_train_on_here_and_crash_pefts_lora_fa(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.optimizers import create_lorafa_optimizer

    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    theirs = peft_model(tiny_gpt2(), lora_config(r=4, lora_alpha=8, target_modules=["c_attn"]), 1)
    ours = our_model(
        tiny_gpt2(), "lora_fa", ["c_attn"], seed=1, rank=4, alpha=8.0, projected=True, kernel=kernel
    )
    their_optimizer = create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=1e-2)
    optimizer = our_optimizer(ours, lr=1e-2)
    skip_first_block(theirs)
    skip_first_block(ours.model)
    with pytest.raises(TypeError):
        train_step(theirs, their_optimizer)
    train_step(ours.model, optimizer)
    moved = [bool(layer.lora_B.any()) for layer in ours.adapters.values()]
    assert moved == [False, True]


def test_an_unmatched_name_is_an_error_here_and_passes_silently_in_peft() -> None:
    names = ["q_proj", "o_proj"]
    theirs = peft_model(tiny_opt(), lora_config(r=4, target_modules=names))
    assert not [name for name in peft_parameters(theirs) if "o_proj" in name]
    with pytest.raises(ModelError, match="o_proj"):
        our_model(tiny_opt(), "lora", names, rank=4)
