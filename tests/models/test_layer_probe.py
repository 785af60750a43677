"""Which layers an adapter can do something for, against autograd on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import FAMILIES, small_model, tiny_llama
from torch import Tensor, nn

from loratune.errors import ModelError
from loratune.models.build import outline
from loratune.models.probes.layers import OTHERWISE, UNREACHED, unusable_layers
from loratune.models.probes.shortened import short_copy, shortened

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"state_size": 4, "time_step_rank": 4}
BUILD: dict[str, Callable[[], Any]] = {
    "mamba": lambda: small_model("mamba", **MAMBA),
    "bart": lambda: small_model("bart", d_model=32, decoder_layers=2, decoder_ffn_dim=48,
                                decoder_attention_heads=2, encoder_layers=1),
    "phimoe": lambda: small_model("phimoe", **MOE),
    "big_bird": lambda: small_model("big_bird", is_decoder=True),
    "mistral": lambda: small_model("mistral", sliding_window=8),
}  # fmt: skip
EXPECTED = {
    "mamba": {f"backbone.layers.{n}.mixer.dt_proj": UNREACHED for n in (0, 1)},
    "bart": {
        f"model.decoder.layers.{n}.encoder_attn.{part}": UNREACHED
        for n in (0, 1)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj")
    },
    "phimoe": {f"model.layers.{n}.mlp.router": OTHERWISE for n in (0, 1)},
    "big_bird": {"bert.pooler": UNREACHED},
    "mistral": {},
}


@pytest.mark.parametrize("name", BUILD)
def test_layers_that_no_adapter_can_do_anything_for_are_noticed(name: str) -> None:
    model = BUILD[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert unusable_layers(model) == EXPECTED[name]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize("name", BUILD)
def test_the_same_is_seen_without_any_weight(name: str) -> None:
    model = outline(BUILD[name]().config.to_dict())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert unusable_layers(model) == EXPECTED[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_of_a_plain_decoder_can_be_adapted(name: str) -> None:
    assert unusable_layers(FAMILIES[name]()) == {}


def test_a_weight_of_zeros_hides_no_layer() -> None:
    """An adapter beside it trains, and then gradients flow through it."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    assert unusable_layers(model) == {}


def test_only_the_blocks_of_a_kind_that_lacks_a_layer_lose_it() -> None:
    class Unused(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.inner.weight.T

    model = tiny_llama(num_hidden_layers=4)
    for number in (1, 3):
        attention = model.model.layers[number].self_attn
        attention.o_proj = Unused(attention.o_proj)
    names = {f"model.layers.{number}.self_attn.o_proj.inner" for number in (1, 3)}
    assert set(unusable_layers(model)) == names


def test_a_model_that_asks_for_rows_of_certain_lengths_is_refused() -> None:
    reformer = small_model(
        "reformer", is_decoder=True, attn_layers=["local", "local"], axial_pos_shape=[8, 16],
        axial_pos_embds_dim=[16, 16], attention_head_size=16, feed_forward_size=48,
        local_attn_chunk_length=8,
    )  # fmt: skip
    with pytest.raises(ModelError, match="has to be a multiple of"):
        unusable_layers(reformer)


def test_a_model_that_counts_its_blocks_itself_is_copied_whole() -> None:
    xlm = small_model("xlm", emb_dim=32, n_layers=2, n_heads=2, causal=True, n_langs=1)
    assert short_copy(xlm).places == () and len(shortened(xlm).transformer.ffns) == 2
    assert unusable_layers(xlm) == {}


def test_a_model_with_states_of_its_last_pass_can_be_copied() -> None:
    """Recurrent Gemma keeps them as attributes, with their history."""
    model = small_model("recurrent_gemma", num_hidden_layers=3, lru_width=32)
    model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    assert unusable_layers(model) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_outline_begins_as_the_model_itself_does(family: str) -> None:
    """Masks, frequencies, and weights of the usual size; tied ones tied."""
    real = FAMILIES[family]()
    short = shortened(outline(real.config.to_dict()))
    expected = dict(shortened(real).named_buffers())
    for name, buffer in short.named_buffers():
        torch.testing.assert_close(buffer, expected[name])
    tied = real.get_output_embeddings().weight is real.get_input_embeddings().weight
    weight = short.get_output_embeddings().weight
    assert (weight is short.get_input_embeddings().weight) == tied
    spread = float(real.get_output_embeddings().weight.detach().std())
    assert float(weight.detach().std()) == pytest.approx(spread, rel=0.1)
