"""What comes behind a token must not change what a model makes of it."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import FAMILIES, VOCABULARY, small_model, tiny_mistral, tiny_rwkv

from loratune.config.schema import RunConfig, TrainerConfig
from loratune.data.arrangement import check_single_rows
from loratune.errors import ConfigError, ModelError
from loratune.models.build import outline
from loratune.models.probes.rows_alone import probe_rows_alone

TOKENS = range(3, VOCABULARY)


@pytest.mark.parametrize("name", [*FAMILIES, "mistral", "rwkv"])
def test_decoders_see_nothing_of_what_comes_later(name: str) -> None:
    model = {**FAMILIES, "mistral": tiny_mistral, "rwkv": tiny_rwkv}[name]()
    probe = probe_rows_alone(model, 60, TOKENS)
    assert probe.is_causal and probe.pads


@pytest.mark.parametrize("is_decoder", [False, True])
def test_bert_is_causal_as_a_decoder_alone(is_decoder: bool) -> None:
    bert = small_model("bert", is_decoder=is_decoder)
    probe = probe_rows_alone(bert, 60, TOKENS)
    assert probe.is_causal == probe.pads == is_decoder
    ids = torch.tensor([TOKENS[:20]])
    other = torch.cat([ids[:, :10], ids[:, :10]], dim=1)
    with torch.no_grad():
        first, second = (bert(input_ids=one).logits[:, :10] for one in (ids, other))
    assert torch.allclose(first, second, atol=1e-5) == is_decoder


def test_what_the_probe_says_does_not_depend_on_the_weights() -> None:
    for is_decoder in (False, True):
        numbers = small_model("bert", is_decoder=is_decoder).config.to_dict()
        assert probe_rows_alone(outline(numbers), 60, TOKENS).is_causal == is_decoder


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match=r"not causal.*is_decoder=true"):
        check_single_rows(RunConfig(), small_model("bert"), 40, TOKENS)


def test_a_model_that_padding_disturbs_takes_single_rows() -> None:
    """ProphetNet's distances depend on how long the padded row is."""
    model = small_model(
        "prophetnet", num_hidden_layers=None, num_attention_heads=None, num_decoder_layers=2,
        num_decoder_attention_heads=2, decoder_ffn_dim=48, num_encoder_layers=1,
        num_encoder_attention_heads=2, encoder_ffn_dim=48, is_decoder=True,
    )  # fmt: skip
    probe = probe_rows_alone(model, 100, TOKENS)
    assert probe.is_causal and not probe.pads
    config = RunConfig(trainer=TrainerConfig(batch_size=2))
    with pytest.raises(ConfigError, match=r"set trainer.batch_size=1 evaluate.batch_size=1"):
        check_single_rows(config, model, 100, TOKENS)
    config.trainer.batch_size = config.evaluate.batch_size = 1
    check_single_rows(config, model, 100, TOKENS)
