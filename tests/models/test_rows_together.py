"""The probe says what a model really does with several rows in one sequence."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import FAMILIES, VOCABULARY, small_model, tiny_llama, tiny_opt

from loratune.models.probes.rows_together import probe_rows_together
from loratune.models.probes.shortened import shortened

TOKENS = range(3, VOCABULARY)


WINDOWED = {
    "mistral": lambda: small_model("mistral", sliding_window=8),
    "gemma2": lambda: small_model("gemma2", sliding_window=8),
    "gpt_oss": lambda: small_model(
        "gpt_oss", sliding_window=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "roberta": lambda: small_model("roberta", is_decoder=True),
}
BLOOM = {"bloom": lambda: small_model("bloom", n_layer=2, n_head=2)}
RECURRENT = {
    "mamba2": lambda: small_model("mamba2", num_heads=4, n_groups=1, chunk_size=8, state_size=8),
    "rwkv": lambda: small_model("rwkv", attention_hidden_size=32),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FAMILIES, *WINDOWED])
def test_masked_attention_takes_both_layouts_exactly(name: str) -> None:
    probe = probe_rows_together({**FAMILIES, **WINDOWED}[name](), 40, TOKENS)
    assert probe.packs and probe.shares
    assert probe.first_position == (2 if name == "roberta" else 0)


@pytest.mark.parametrize("name", [*RECURRENT, *BLOOM])
def test_state_and_distances_along_the_sequence_are_noticed(name: str) -> None:
    probe = probe_rows_together({**RECURRENT, **BLOOM}[name](), 40, TOKENS)
    assert not probe.shares
    assert probe.packs == (name == "bloom")  # its distances are the same in a row of its own


def test_dropout_shows_as_random_and_the_model_stays_as_it_is() -> None:
    model = tiny_opt(dropout=0.1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = len(model.model.decoder.layers)
    assert probe_rows_together(model, 30, TOKENS).random
    assert not probe_rows_together(tiny_opt(), 30, TOKENS).random
    assert model.training and len(model.model.decoder.layers) == blocks
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_short_copy_has_one_block_of_each_kind() -> None:
    assert len(shortened(tiny_llama(num_hidden_layers=6)).model.layers) == 1
    layers = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    gemma = small_model("gemma3_text", num_hidden_layers=6, layer_types=layers, sliding_window=8)
    short = shortened(gemma.to(torch.bfloat16))
    assert len(short.model.layers) == 2
    assert short.config.layer_types == ["sliding_attention", "full_attention"]
    assert gemma.config.layer_types == layers and len(gemma.model.layers) == 6
    assert next(short.parameters()).dtype is torch.float32
    assert not any(parameter.requires_grad for parameter in short.parameters())
