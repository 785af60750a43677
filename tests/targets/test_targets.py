"""Which layers a pattern means, against PEFT, and what is said when it means none."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

from loratune.adapters.config import AdapterConfig, LayerKind, LayerShape
from loratune.adapters.lora.config import LoRAConfig
from loratune.adapters.registry import config_class
from loratune.config.schema import ModelConfig, TargetsConfig
from loratune.errors import ConfigError, LoratuneError, ModelError, SecurityError
from loratune.models.architectures import Architecture, architecture_from_numbers
from loratune.models.measure import find_architecture, measure_numbers
from loratune.targets.find import TargetMatch, alpha_for, find_targets, rank_for
from loratune.targets.patterns import block_of

# PEFT uses what transformers deprecates, and warns of transposed and of tied layers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning"),
]
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OPT_NUMBERS: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": 96,
    "hidden_size": 32,
    "word_embed_proj_dim": 16,
    "do_layer_norm_before": False,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 40,
    **IDS,
}
GPT2_NUMBERS: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 40,
    **IDS,
}
LLAMA_NUMBERS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    **IDS,
}
OPT = architecture_from_numbers(OPT_NUMBERS)
GPT2 = architecture_from_numbers(GPT2_NUMBERS)
LLAMA = architecture_from_numbers(LLAMA_NUMBERS)


def find(
    architecture: Architecture,
    modules: Any,
    config: AdapterConfig | None = None,
    strict: bool = True,
    **targets: Any,
) -> TargetMatch:
    return find_targets(
        architecture.layers,
        TargetsConfig(modules=modules, **targets),
        config,
        architecture.family,
        others=architecture.other_types,
        strict=strict,
    )


def names(match: TargetMatch) -> list[str]:
    return [shape.name for shape in match.shapes]


def peft_names(numbers: dict[str, Any], **settings: Any) -> list[str]:
    values = dict(numbers)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        wrapped = get_peft_model(model, LoraConfig(**settings), low_cpu_mem_usage=True)
    prefix = "base_model.model."
    return [
        name.removeprefix(prefix)
        for name, module in wrapped.named_modules()
        if isinstance(module, LoraLayer)
    ]


def causes(error: LoratuneError) -> list[str]:
    return error.lines()


@pytest.mark.parametrize(
    ("numbers", "modules", "more"),
    [
        (OPT_NUMBERS, "all-linear", {}),
        (GPT2_NUMBERS, "all-linear", {}),
        (LLAMA_NUMBERS, "all-linear", {}),
        (OPT_NUMBERS, ["q_proj", "v_proj"], {}),
        (OPT_NUMBERS, ["self_attn.q_proj", "fc1"], {}),
        (OPT_NUMBERS, ["layers.1.fc1"], {}),
        (OPT_NUMBERS, r".*\.(q|v)_proj", {}),
        (OPT_NUMBERS, r"model\.decoder\.layers\.[02]\.fc\d", {}),
        (OPT_NUMBERS, ["q_proj", "fc1"], {"exclude": ["layers.0.fc1"]}),
        (OPT_NUMBERS, ["q_proj", "fc1"], {"layers": [0, 2]}),
        (OPT_NUMBERS, ["embed_tokens", "lm_head"], {}),
        (GPT2_NUMBERS, ["c_proj"], {}),
        (GPT2_NUMBERS, ["c_attn", "wte"], {}),
    ],
)
def test_patterns_mean_the_same_layers_as_in_peft(
    numbers: dict[str, Any], modules: Any, more: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"target_modules": modules}
    if "exclude" in more:
        settings["exclude_modules"] = more["exclude"]
    if "layers" in more:
        settings["layers_to_transform"] = more["layers"]
    found = names(find(architecture_from_numbers(numbers), modules, **more))
    assert found == peft_names(numbers, **settings)
    assert found


@pytest.mark.parametrize(
    ("architecture", "word", "suffixes"),
    [
        (OPT, "attention_qv", ["self_attn.v_proj", "self_attn.q_proj"]),
        (LLAMA, "attention_qv", ["self_attn.q_proj", "self_attn.v_proj"]),
        (GPT2, "attention_qv", ["attn.c_attn"]),
        (
            OPT,
            "attention",
            [f"self_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj")],
        ),
        (GPT2, "attention", ["attn.c_attn", "attn.c_proj"]),
        (OPT, "mlp", ["fc1", "fc2"]),
        (GPT2, "mlp", ["mlp.c_fc", "mlp.c_proj"]),
        (LLAMA, "mlp", ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
    ],
)
def test_a_role_word_names_the_layers_of_each_block_in_model_order(
    architecture: Architecture, word: str, suffixes: list[str]
) -> None:
    block = {"opt": "model.decoder.layers", "gpt2": "transformer.h", "llama": "model.layers"}
    blocks = 3 if architecture is OPT else 2
    prefix = block[architecture.family]
    expected = [f"{prefix}.{index}.{suffix}" for index in range(blocks) for suffix in suffixes]
    assert names(find(architecture, word)) == expected


def test_a_fused_projection_is_announced_with_what_else_it_holds() -> None:
    assert "key" in find(GPT2, "attention_qv").notices[0]
    assert find(GPT2, "attention").notices == ()
    assert find(OPT, "attention_qv").notices == ()


def test_all_linear_announces_layers_outside_the_blocks() -> None:
    assert "project_in" in find(OPT, "all_linear").notices[0]
    assert find(LLAMA, "all_linear").notices == ()
    assert "lm_head" not in names(find(LLAMA, "all_linear"))


def test_role_words_work_for_a_family_that_is_only_measured() -> None:
    numbers = LLAMA_NUMBERS | {"model_type": "mixtral", "num_local_experts": 2}
    mixtral = measure_numbers(numbers)
    match = find(mixtral, "attention_qv")
    assert len(match.shapes) == 4
    assert "self_attn.q_proj" in match.notices[0]
    with pytest.raises(ModelError, match="not known") as caught:
        find(mixtral, "mlp")
    assert "all_linear" in caught.value.fix


def mixture(family: str = "mixtral") -> Architecture:
    numbers = LLAMA_NUMBERS | {"model_type": family, "num_local_experts": 2}
    return measure_numbers(numbers)


def test_stacked_experts_are_layers_that_a_word_or_their_name_means() -> None:
    mixtral = mixture()
    experts = [f"model.layers.{n}.mlp.experts.{key}" for n in (0, 1)
               for key in ("gate_up_proj", "down_proj")]  # fmt: skip
    assert names(find(mixtral, "experts")) == experts
    assert names(find(mixtral, ["gate_up_proj"])) == experts[::2]
    both = find(mixtral, "all_linear_and_experts")
    assert set(names(both)) == {*experts, *names(find(mixtral, "all_linear"))}
    assert not any("frozen" in line for line in both.notices)
    gate_up, down = find(mixtral, "experts").shapes[:2]
    assert (gate_up.experts, gate_up.in_features, gate_up.out_features) == (2, 32, 96)
    assert (down.experts, down.in_features, down.out_features) == (2, 48, 32)


def test_experts_are_refused_by_name_where_the_variant_or_their_form_forbids_it() -> None:
    first = "layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(ModelError, match="vera cannot adapt experts") as caught:
        find(mixture(), [first], config_class("vera")())
    assert caught.value.where == f"model.{first}"
    with pytest.raises(ModelError, match="vera cannot adapt experts") as several:
        find(mixture(), "experts", config_class("vera")())
    assert str(several.value.where).startswith(f"model.{first} and ")
    with pytest.raises(ModelError, match="take no dropout"):
        find(mixture(), [first], LoRAConfig(dropout=0.1))
    with pytest.raises(ModelError, match="group of modules") as grouped:
        find(mixture(), ["experts"])
    assert "gate_up_proj, down_proj" in grouped.value.fix
    with pytest.raises(ModelError, match="no experts that are stacked"):
        find(LLAMA, "experts")
    numbers = {"model_type": "dbrx", "d_model": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 96,
               "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
               "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}}  # fmt: skip
    flat = measure_numbers(numbers)
    with pytest.raises(ModelError, match=r"experts\.mlp\.w1.*stacked in one tensor") as fixed:
        find_targets(
            flat.layers,
            TargetsConfig(modules=["experts"]),
            others=flat.other_types,
            stacked=flat.stacked_experts,
        )
    assert fixed.value.exit_code == 4


def test_a_suffix_matches_whole_parts_of_a_name_only() -> None:
    layers = [
        LayerShape(name, LayerKind.linear, 4, 4) for name in ("a.attn", "a.unattn", "a.attn.b")
    ]
    match = find_targets(layers, TargetsConfig(modules=["attn"]))
    assert names(match) == ["a.attn"]


def test_the_match_counts_say_what_each_pattern_found() -> None:
    match = find(OPT, ["q_proj", "fc1", "layers.0.fc2"], exclude=["layers.1.fc1"])
    assert match.counts == {"q_proj": 3, "fc1": 2, "layers.0.fc2": 1}


def test_a_pattern_that_matches_nothing_names_the_closest_layers_with_shapes() -> None:
    with pytest.raises(ModelError, match="'o_proj'") as caught:
        find(OPT, ["q_proj", "o_proj"])
    assert caught.value.exit_code == 4
    assert caught.value.where == "targets.modules"
    closest = caught.value.fix.removeprefix("the closest layers are ")
    assert closest.startswith("self_attn.out_proj (32 → 32, 3 layers)")


def test_every_pattern_that_matches_nothing_is_reported_in_one_go() -> None:
    with pytest.raises(LoratuneError) as caught:
        find(OPT, ["o_proj", "q_proj", "gate_proj", "w1"])
    lines = causes(caught.value)
    assert len(lines) == 3
    assert ["o_proj" in lines[0], "gate_proj" in lines[1], "w1" in lines[2]] == [True] * 3
    assert "k_proj" in lines[2]


def test_an_imported_config_must_match_once_in_all() -> None:
    assert len(find(OPT, ["q_proj", "o_proj"], strict=False).shapes) == 3
    with pytest.raises(LoratuneError) as caught:
        find(OPT, ["o_proj", "gate_proj"], strict=False)
    assert len(causes(caught.value)) == 2


@pytest.mark.parametrize(
    ("pattern", "type_name"),
    [("self_attn_layer_norm", "LayerNorm"), ("embed_positions", "OPTLearnedPositionalEmbedding")],
)
def test_a_module_that_cannot_be_adapted_is_named_with_its_type(
    pattern: str, type_name: str
) -> None:
    with pytest.raises(ModelError, match=type_name) as caught:
        find(OPT, [pattern])
    assert pattern in caught.value.cause
    assert caught.value.exit_code == 4


def test_a_group_of_layers_is_answered_with_its_layers() -> None:
    with pytest.raises(ModelError, match="group") as caught:
        find(OPT, ["self_attn"])
    assert "k_proj, v_proj, q_proj, out_proj" in caught.value.fix


def test_a_name_given_as_a_string_is_told_apart_from_an_expression() -> None:
    with pytest.raises(ModelError) as caught:
        find(OPT, "q_proj")
    assert "[q_proj]" in caught.value.fix


@pytest.mark.parametrize("strict", [True, False])
def test_a_slow_expression_stops_within_its_second(strict: bool) -> None:
    with pytest.raises(SecurityError, match="1 s") as caught:
        find(OPT, r"(?:[a-z]|[a-z_]|[a-z.0-9]|\w)+(?<=[QZ])", strict=strict)
    assert caught.value.exit_code == 9


def test_a_slow_rank_pattern_stops_within_its_second() -> None:
    config = LoRAConfig(rank_pattern={r"(?:[a-z]|[a-z_]|[a-z.0-9]|\w)+(?<=[QZ])": 4})
    with pytest.raises(SecurityError):
        find(OPT, ["q_proj"], config)


@pytest.mark.parametrize("modules", ["(", "x" * 5000, "", [], None, 3, ["q_proj", 1], {"a": 1}])
def test_malformed_modules_are_a_config_error(modules: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        find(OPT, modules)
    assert caught.value.where == "targets.modules"


def test_excluding_everything_a_pattern_names_is_an_error() -> None:
    with pytest.raises(ModelError, match="leaves every one"):
        find(OPT, ["q_proj", "fc1"], exclude=["fc1"])
    with pytest.raises(ModelError, match="leaves every one"):
        find(OPT, ["fc1"], modules_to_save=["layers"])


def test_a_module_trained_in_full_gets_no_adapter() -> None:
    match = find(OPT, ["fc1"], modules_to_save=["layers.1"])
    assert names(match) == ["model.decoder.layers.0.fc1", "model.decoder.layers.2.fc1"]


def test_an_exclusion_that_names_nothing_is_an_error() -> None:
    with pytest.raises(ModelError, match="'fc3'") as caught:
        find(OPT, ["fc1"], exclude=["fc3"])
    assert caught.value.where == "targets.exclude"


def test_blocks_that_do_not_exist_are_an_error() -> None:
    with pytest.raises(ModelError, match="no block 3, 9") as caught:
        find(OPT, ["fc1"], layers=[1, 3, 9])
    assert caught.value.fix == "blocks are numbered 0 to 2"


@pytest.mark.parametrize("variant", ["lora_fa", "vera"])
def test_layers_that_a_variant_cannot_adapt_are_refused(variant: str) -> None:
    with pytest.raises(ModelError, match="embedding") as caught:
        find(OPT, ["q_proj", "embed_tokens"], config_class(variant)())
    assert caught.value.where == "model.decoder.embed_tokens"
    assert find(OPT, ["q_proj", "embed_tokens"], LoRAConfig()).shapes[0].kind == "embedding"


PATTERNS: dict[str, int] = {
    "layers.0.fc1": 2,
    "fc1": 3,
    r"layers\.[01]\.fc2": 5,
    "model.decoder.layers.2.fc2": 7,
}


def test_rank_and_alpha_patterns_resolve_as_in_peft() -> None:
    values = dict(OPT_NUMBERS)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config)
    alphas = {key: 2.0 * rank for key, rank in PATTERNS.items()}
    settings = {"r": 8, "lora_alpha": 16, "rank_pattern": PATTERNS, "alpha_pattern": alphas}
    peft = get_peft_model(model, LoraConfig(target_modules=["fc1", "fc2", "q_proj"], **settings))
    ours = LoRAConfig(rank=8, alpha=16, rank_pattern=PATTERNS, alpha_pattern=alphas)
    match = find(OPT, ["fc1", "fc2", "q_proj"], ours)
    for shape in match.shapes:
        layer = peft.get_submodule(f"base_model.model.{shape.name}")
        assert rank_for(shape.name, ours) == layer.r["default"]
        assert alpha_for(shape.name, ours) == layer.lora_alpha["default"]


def test_a_rank_pattern_that_fits_no_adapted_layer_is_an_error() -> None:
    config = LoRAConfig(rank_pattern={"fc1": 4, "q_prj": 2}, alpha_pattern={"fc2": 1.0})
    with pytest.raises(LoratuneError) as caught:
        find(OPT, ["fc1", "q_proj"], config)
    lines = causes(caught.value)
    assert ["q_prj" in lines[0], "fc2" in lines[1]] == [True, True]
    assert caught.value.exit_code == 2


RECIPES = Path(__file__).parents[2] / "recipes"


def all_feed_forward_is_experts(architecture: Architecture) -> bool:
    """Whether every block's feed-forward part is experts stacked in one tensor."""
    blocks = {block_of(name) for name in architecture.stacked_experts}
    return blocks == set(range(architecture.numbers.get("num_hidden_layers", 0))) and not any(
        ".mlp." in shape.name and not shape.is_stacked for shape in architecture.layers
    )


@cache
def architecture_of(model: Path) -> Architecture:
    """What a model's recipe describes."""
    numbers = ModelConfig(**yaml.safe_load(model.read_text())).architecture
    return find_architecture(ModelConfig(path="not/here", architecture=numbers))


@pytest.mark.parametrize(
    "targets", sorted((RECIPES / "targets").glob("*.yaml")), ids=lambda path: path.stem
)
@pytest.mark.parametrize(
    "model", sorted((RECIPES / "model").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_targets_recipe_finds_layers_in_every_block_of_every_model(
    model: Path, targets: Path
) -> None:
    numbers = ModelConfig(**yaml.safe_load(model.read_text())).architecture
    assert numbers is not None
    architecture = architecture_of(model)
    wanted = TargetsConfig(**yaml.safe_load(targets.read_text()))
    if wanted.modules == "mlp" and all_feed_forward_is_experts(architecture):
        with pytest.raises(ModelError, match="'mlp' means"):
            find_targets(architecture.layers, wanted, LoRAConfig(), architecture.family)
        return
    match = find_targets(architecture.layers, wanted, LoRAConfig(), architecture.family)
    text = numbers.get("text_config", numbers)
    # Layers for images are left out where the model is run, since no loss on text reaches them.
    named = [
        shape.name for shape in match.shapes if text is numbers or "language_model" in shape.name
    ]
    blocks = {block_of(name) for name in named} - {None}
    count = text.get("num_hidden_layers", text.get("n_layer"))
    assert blocks == set(range(count))
    assert targets.read_text().startswith("# loratune ")


def test_experts_that_stay_frozen_under_all_linear_are_counted() -> None:
    numbers = LLAMA_NUMBERS | {"model_type": "mixtral", "num_local_experts": 2}
    mixtral = measure_numbers(numbers)
    frozen = sum(mixtral.stacked_experts.values())
    assert frozen == 2 * 2 * (2 * 48 * 32 + 32 * 48)
    match = find_targets(
        mixtral.layers, TargetsConfig(modules="all_linear"), stacked=mixtral.stacked_experts
    )
    [line] = [line for line in match.notices if "experts" in line]
    assert f"leaves {frozen:,} parameters of experts frozen" in line
    assert "model.layers.0.mlp.experts.gate_up_proj and 3 more" in line
    listed = find_targets(
        mixtral.layers, TargetsConfig(modules=["q_proj"]), stacked=mixtral.stacked_experts
    )
    assert f"q_proj leaves {frozen:,} parameters of experts frozen" in listed.notices[0]


def test_a_name_of_layers_means_experts_only_where_it_names_nothing_else() -> None:
    layer = LayerShape("model.layers.0.mlp.down_proj", LayerKind.linear, 8, 8)
    stack = LayerShape(
        "model.layers.1.mlp.experts.down_proj", LayerKind.experts, 8, 8, 128, experts=2
    )
    frozen = {stack.name: stack.parameters}
    both = find_targets([layer, stack], TargetsConfig(modules=["down_proj"]), stacked=frozen)
    assert both.shapes == (layer,)
    assert "down_proj leaves 128 parameters of experts frozen" in both.notices[0]
    named = find_targets(
        [layer, stack], TargetsConfig(modules=["down_proj", "experts.down_proj"]), stacked=frozen
    )
    assert named.shapes == (layer, stack) and not named.notices
    assert find_targets([stack], TargetsConfig(modules=["down_proj"])).shapes == (stack,)


def test_a_name_of_layers_and_of_experts_adapts_the_layers_and_says_so() -> None:
    shape = LayerShape("model.layers.0.mlp.down_proj", LayerKind.linear, 8, 8)
    stacked = {"model.layers.1.mlp.experts.down_proj": 128}
    match = find_targets([shape], TargetsConfig(modules=["down_proj"]), stacked=stacked)
    assert match.shapes == (shape,)
    assert "down_proj leaves 128 parameters of experts frozen" in match.notices[0]
    with pytest.raises(ModelError, match="stacked in one tensor"):
        find_targets([shape], TargetsConfig(modules=["down_proj", "experts"]), stacked=stacked)


def test_a_wrapped_model_names_the_experts_that_stay_frozen() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from loratune.surgery import wrap_model

    sizes = {key: value for key, value in LLAMA_NUMBERS.items() if key != "model_type"}
    model = MixtralForCausalLM(MixtralConfig(num_local_experts=2, **sizes))
    wrapped = wrap_model(model, LoRAConfig(), TargetsConfig(modules="all_linear"))
    assert any("parameters of experts frozen" in line for line in wrapped.match.notices)
