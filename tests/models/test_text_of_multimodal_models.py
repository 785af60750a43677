"""A model that reads more than text: loaded whole, trained on text, all else left as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import save_base, tiny_images_and_text, token_ids
from transformers import AutoConfig, Qwen3VLForConditionalGeneration

import loratune
from loratune.adapters.registry import config_class
from loratune.config.schema import TargetsConfig
from loratune.errors import ModelError
from loratune.models.build import auto_class, outline
from loratune.models.load import load_model
from loratune.models.measure import measure_source
from loratune.models.probes.layers import UNREACHED, unusable_layers
from loratune.models.vocabulary import tokenizer_and_rows
from loratune.targets.find import find_targets


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), tiny_images_and_text())


@pytest.mark.parametrize(
    ("kind", "architecture", "auto"),
    [
        ("llama", None, "AutoModelForCausalLM"),
        ("gemma3", "Gemma3ForConditionalGeneration", "AutoModelForCausalLM"),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "AutoModelForMultimodalLM"),
        ("qwen2_5_vl", None, "AutoModelForMultimodalLM"),
        ("llama4", "Llama4ForConditionalGeneration", "AutoModelForMultimodalLM"),
        ("llama4", "Llama4ForCausalLM", "AutoModelForCausalLM"),
        ("mllama", "MllamaForConditionalGeneration", "AutoModelForMultimodalLM"),
    ],
)
def test_the_class_that_wrote_a_checkpoint_reads_it(
    kind: str, architecture: str | None, auto: str
) -> None:
    config = AutoConfig.for_model(kind)
    config.architectures = [architecture] if architecture else None
    assert auto_class(config, "here").__name__ == auto


@pytest.mark.parametrize("kind", ["pi0", "clip"])
def test_what_cannot_write_text_is_refused(kind: str) -> None:
    with pytest.raises(ModelError, match=f"no causal language model for .* '{kind}'"):
        auto_class(AutoConfig.for_model(kind), "here")


def test_every_stored_tensor_has_its_place(folder: Path) -> None:
    model = load_model(folder, torch.float32)
    assert type(model) is Qwen3VLForConditionalGeneration
    stored = load_file(folder / "model.safetensors")
    own = dict(model.named_parameters())
    assert any("visual" in name for name in stored)
    assert all(torch.equal(own[name], tensor) for name, tensor in stored.items())


def test_the_parameters_counted_without_weights_are_those_loaded(folder: Path) -> None:
    architecture = measure_source(folder)
    model = load_model(folder, torch.float32)
    assert architecture.base_parameters == sum(p.numel() for p in model.parameters())
    assert architecture.unusable == unusable_layers(model)


def test_words_mean_the_language_model_alone(folder: Path) -> None:
    architecture = measure_source(folder)
    for word in ("all_linear", "attention", "attention_qv", "mlp"):
        match = find_targets(
            architecture.layers, TargetsConfig(modules=word), unusable=architecture.unusable
        )
        assert match.shapes and match.notices
        assert all(s.name.startswith("model.language_model.layers.") for s in match.shapes)
        assert any("model.visual" in notice for notice in match.notices)


def test_a_name_that_the_tower_has_too_is_refused_before_training(folder: Path) -> None:
    architecture = measure_source(folder)
    named = TargetsConfig(modules=["q_proj", "linear_fc1"])
    with pytest.raises(ModelError, match=f"names 4 layers {UNREACHED}: model.visual"):
        find_targets(
            architecture.layers, named, config_class("lora")(), unusable=architecture.unusable
        )


def test_what_is_said_to_be_unreached_gets_no_gradient_from_text() -> None:
    model: Any = tiny_images_and_text()
    model(input_ids=token_ids(), use_cache=False).logits.square().mean().backward()
    without = {
        name.removesuffix(".weight")
        for name, p in model.named_parameters()
        if p.grad is None and p.dim() == 2
    }
    assert set(unusable_layers(model)) == without
    assert unusable_layers(outline(model.config.to_dict())).keys() == without


def test_the_library_leaves_the_tower_alone_where_it_is_told_that_all_is_text() -> None:
    wrapped = loratune.wrap(tiny_images_and_text(), targets="all_linear", text_only=True)
    assert not any("visual" in name for name in wrapped.adapters)
    everything = loratune.wrap(tiny_images_and_text(), targets="all_linear")
    assert any("visual" in name for name in everything.adapters)


def test_the_vocabulary_is_the_language_model_s(folder: Path) -> None:
    assert tokenizer_and_rows(folder)[1] == 300
