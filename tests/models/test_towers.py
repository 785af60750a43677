"""Towers are told from the text's model, and their weights stay out of what is tried on text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bases.tiny_base import tiny_config
from support.families import gemma3
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    Gemma3ForConditionalGeneration,
)

from loratune.models.build import outline
from loratune.models.probes.layers import UNREACHED, unusable_layers
from loratune.models.probes.shortened import short_copy
from loratune.models.towers import tower_prefixes

TOWER = "model.vision_tower."


def _multimodal(name: str) -> Any:
    with torch.device("meta"):
        return AutoModelForMultimodalLM.from_config(tiny_config(name))


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("gemma3", TOWER),
        ("qwen2_5_vl", "model.visual."),  # says of itself that it reads text
        ("voxtral", "model.audio_tower."),
    ],
)
def test_a_tower_is_what_takes_no_text(name: str, prefix: str) -> None:
    assert tower_prefixes(_multimodal(name)) == (prefix,)


@pytest.mark.parametrize("name", ["llama", "bart", "blt"])
def test_models_of_text_have_none(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(name))
    assert tower_prefixes(model) == ()


@pytest.mark.parametrize("has_weights", [True, False])
def test_a_short_copy_holds_no_weights_of_towers(has_weights: bool) -> None:
    model = gemma3() if has_weights else outline(gemma3().config.to_dict())
    short = short_copy(model)
    sizes = {True: 0, False: 0}
    for name, parameter in short.model.named_parameters():
        sizes[name.startswith(TOWER)] = max(sizes[name.startswith(TOWER)], parameter.numel())
        assert not parameter.is_meta
    assert sizes[True] == 1 and sizes[False] > 1
    assert short.emptied == (TOWER,)
    if has_weights:
        ids = torch.arange(3, 9)[None]
        assert torch.equal(short.model(input_ids=ids).logits, model(input_ids=ids).logits)
    layers = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    in_tower = {name for name in layers if name.startswith(TOWER)}
    unusable = unusable_layers(model)
    assert in_tower and in_tower == unusable.keys() & layers
    assert set(unusable.values()) == {UNREACHED}


class _Reading(Gemma3ForConditionalGeneration):
    """A model whose text depends on its tower."""

    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.logits = output.logits + next(self.model.vision_tower.parameters()).sum()
        return output


def test_a_tower_that_text_does_reach_is_copied() -> None:
    model = gemma3()
    model.__class__ = _Reading
    short = short_copy(model)
    assert short.emptied == ()
    ids = torch.arange(3, 9)[None]
    assert torch.equal(short.model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_blocks_that_are_cut_are_those_of_the_text() -> None:
    numbers = gemma3().config.to_dict()
    numbers["vision_config"] |= {"num_hidden_layers": 6, "intermediate_size": 512}
    short = short_copy(outline(numbers))
    assert short.prefix == "model.language_model.layers." and short.places == (0, 1)
