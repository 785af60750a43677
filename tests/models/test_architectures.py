"""Names, shapes and totals that loratune infers from numbers, against the models themselves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
)

from loratune.adapters.config import LayerKind
from loratune.config.schema import ModelConfig
from loratune.errors import ConfigError, ModelError
from loratune.models.architectures import (
    STACKED_EXPERTS,
    architecture_from_numbers,
    is_known_family,
)
from loratune.models.architectures.families import FAMILIES
from loratune.models.measure import (
    find_architecture,
    measure_model,
    measure_numbers,
)
from loratune.models.source import read_config, read_model_config

MODEL_RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "model").glob("*.yaml"))
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_LIKE = SMALL | {"intermediate_size": 48}
OPT = SMALL | {"ffn_dim": 64, "max_position_embeddings": 40}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NUMBERS = {
    "opt": {"model_type": "opt", **OPT},
    "opt-projected-post-norm": {
        "model_type": "opt",
        **OPT,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    },
    "opt-no-bias": {"model_type": "opt", **OPT, "enable_bias": False},
    "opt-no-affine": {"model_type": "opt", **OPT, "layer_norm_elementwise_affine": False},
    "opt-no-final-norm": {"model_type": "opt", **OPT, "_remove_final_layer_norm": True},
    "opt-untied": {"model_type": "opt", **OPT, "tie_word_embeddings": False},
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2-inner": {"model_type": "gpt2", **GPT2, "n_inner": 80, "tie_word_embeddings": False},
    "llama": {"model_type": "llama", **LLAMA_LIKE},
    "llama-grouped": {"model_type": "llama", **LLAMA_LIKE, "num_key_value_heads": 2},
    "llama-head-width": {"model_type": "llama", **LLAMA_LIKE, "head_dim": 12},
    "llama-tied": {"model_type": "llama", **LLAMA_LIKE, "tie_word_embeddings": True},
    "llama-biased": {"model_type": "llama", **LLAMA_LIKE, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **LLAMA_LIKE},
    "mistral-grouped": {"model_type": "mistral", **LLAMA_LIKE, "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", **LLAMA_LIKE},
    "qwen2-grouped": {"model_type": "qwen2", **LLAMA_LIKE, "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", **LLAMA_LIKE},
    "qwen3-biased": {"model_type": "qwen3", **LLAMA_LIKE, "attention_bias": True, "head_dim": 8},
    "gemma": {"model_type": "gemma", **LLAMA_LIKE},
    "gemma-grouped": {"model_type": "gemma", **LLAMA_LIKE, "num_key_value_heads": 1},
}


def recipe_numbers(path: Path) -> dict[str, object]:
    numbers = yaml.safe_load(path.read_text())["architecture"]
    assert isinstance(numbers, dict)
    return numbers


def transformers_model(numbers: dict[str, object]) -> Any:
    values = dict(numbers)
    # Their defaults lie outside small vocabularies, which transformers warns about.
    config = AutoConfig.for_model(str(values.pop("model_type")), **values)
    is_text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    kind = AutoModelForCausalLM if is_text else AutoModelForMultimodalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    assert isinstance(model, torch.nn.Module)
    return model


def assert_equals_transformers(numbers: dict[str, object]) -> None:
    expected = measure_model(transformers_model(numbers))
    inferred = architecture_from_numbers(numbers)
    assert list(inferred.layers) == list(expected.layers)
    assert list(inferred.others) == list(expected.others)
    assert inferred.base_parameters == expected.base_parameters
    assert inferred.family == expected.family


@pytest.mark.parametrize("path", MODEL_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_model_has_the_layers_and_parameters_that_transformers_builds(path: Path) -> None:
    numbers = recipe_numbers(path)
    if is_known_family(numbers):
        assert_equals_transformers(numbers)
    model = transformers_model(numbers)
    counted = find_architecture(ModelConfig(path="not/here", architecture=numbers))
    assert counted.base_parameters == sum(parameter.numel() for parameter in model.parameters())
    said = re.search(r"with ([\d,]+) parameters", path.read_text())
    assert path.stem == "demo" or (said and said[1] == f"{counted.base_parameters:,}")
    if images := re.search(r"([\d,]+) of them for images", path.read_text()):
        text = {id(p) for p in model.get_decoder().parameters()}
        text |= {id(p) for p in model.get_output_embeddings().parameters()}
        others = [p.numel() for p in model.parameters() if id(p) not in text]
        assert images[1] == f"{sum(others):,}"


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS.keys())
def test_every_option_of_a_family_changes_the_layers_as_in_transformers(
    numbers: dict[str, object],
) -> None:
    assert_equals_transformers(numbers)


def test_measured_layers_are_the_linear_conv1d_and_embedding_modules_of_the_model() -> None:
    model = transformers_model(NUMBERS["gpt2"])
    wanted = {"Linear", "Conv1D", "Embedding"}
    expected = [
        (name, sum(p.numel() for p in module.parameters()))
        for name, module in model.named_modules()
        if type(module).__name__ in wanted
    ]
    layers = architecture_from_numbers(NUMBERS["gpt2"]).layers
    assert [(layer.name, layer.parameters) for layer in layers] == expected


@pytest.mark.parametrize("path", MODEL_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_model_opens_with_the_command_that_runs_it(path: Path) -> None:
    assert path.read_text().startswith("# loratune ")


def test_the_demo_recipe_has_the_numbers_of_the_embedded_model() -> None:
    recipe = next(path for path in MODEL_RECIPES if path.stem == "demo")
    numbers = recipe_numbers(recipe)
    embedded = find_architecture(ModelConfig(path="builtin:demo-opt"))
    assert architecture_from_numbers(numbers).layers == embedded.layers
    assert architecture_from_numbers(numbers).base_parameters == embedded.base_parameters


def test_the_numbers_above_cover_every_family() -> None:
    assert {numbers["model_type"] for numbers in NUMBERS.values()} == set(FAMILIES)


def test_a_saved_config_gives_the_same_architecture_as_its_numbers(tmp_path: Path) -> None:
    numbers = NUMBERS["opt-projected-post-norm"]
    AutoConfig.for_model(**numbers).save_pretrained(tmp_path)
    read = find_architecture(ModelConfig(path=str(tmp_path)))
    assert read.layers == architecture_from_numbers(numbers).layers
    assert read.base_parameters == architecture_from_numbers(numbers).base_parameters


def test_a_local_folder_wins_over_the_numbers_of_the_recipe(tmp_path: Path) -> None:
    AutoConfig.for_model(**NUMBERS["llama"]).save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path), architecture=NUMBERS["opt"])
    assert find_architecture(model).family == "llama"
    hub = ModelConfig(path="facebook/opt-125m", architecture=NUMBERS["opt"])
    assert find_architecture(hub).family == "opt"


def test_another_family_is_measured_on_the_meta_device(tmp_path: Path) -> None:
    numbers = {"model_type": "phi", **LLAMA_LIKE}
    AutoConfig.for_model(**numbers).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="phi"):
        architecture_from_numbers(numbers)
    found = find_architecture(ModelConfig(path=str(tmp_path)))
    model = transformers_model(numbers)
    assert found.base_parameters == sum(p.numel() for p in model.parameters())
    assert "model.layers.1.self_attn.dense" in [layer.name for layer in found.layers]


def test_stacked_expert_tensors_are_layers_and_their_biases_are_not() -> None:
    numbers = {"model_type": "gpt_oss", **LLAMA_LIKE, "num_key_value_heads": 2}
    found = measure_numbers(numbers | {"num_local_experts": 4})
    experts = {shape.name: shape for shape in found.layers if shape.is_stacked}
    down = experts["model.layers.0.mlp.experts.down_proj"]
    assert (down.kind, down.experts) == (LayerKind.experts_conv1d, 4)
    assert found.other_types["model.layers.0.mlp.experts.down_proj_bias"] == STACKED_EXPERTS
    assert found.stacked_experts.keys() > experts.keys()
    counted = sum(part.parameters for part in found.parts)
    assert counted == found.base_parameters


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "config.json is missing"),
        ("{", "config.json is unreadable"),
        ("[1]", "config.json is not a JSON object"),
        ('{"model_type": "no-such-model"}', "unusable config.json"),
        ('{"a": ' * 100_000, "config.json is unreadable"),
    ],
    ids=["missing", "broken", "no-object", "unknown-family", "too-deep"],
)
def test_a_folder_without_a_usable_config_is_refused(
    tmp_path: Path, content: str | None, cause: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=cause) as caught:
        find_architecture(ModelConfig(path=str(tmp_path)))
    assert str(tmp_path) in caught.value.where
    assert caught.value.exit_code == 4
    assert caught.value.fix


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    for find in (read_config, read_model_config):
        with pytest.raises(ModelError, match="no such folder"):
            find(tmp_path / "absent")
    with pytest.raises(ModelError, match="no such folder"):
        find_architecture(ModelConfig(path=str(tmp_path / "absent"), architecture=NUMBERS["opt"]))


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ModelError, match="no-such-model"):
        find_architecture(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", 0),
        ("hidden_size", "32"),
        ("num_hidden_layers", -1),
        ("vocab_size", 1.5),
        ("enable_bias", "yes"),
        ("tie_word_embeddings", 1),
    ],
)
def test_an_impossible_number_is_named(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        architecture_from_numbers(NUMBERS["opt"] | {key: value})
    assert caught.value.where == "model.architecture"


def test_an_absurd_number_of_blocks_is_refused_at_once() -> None:
    with pytest.raises(ModelError, match="no such model"):
        architecture_from_numbers(NUMBERS["opt"] | {"num_hidden_layers": 10**9})


def test_counting_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys, loratune.models.architectures, loratune.targets.find, "
        "loratune.counting.parameters, loratune.counting.budget, loratune.models.measure, "
        "loratune.counting.tables, loratune.counting.published\n"
        "loratune.counting.published.published_report()\n"
        "print([name for name in ('torch', 'transformers', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
