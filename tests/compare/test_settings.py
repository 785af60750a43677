"""Which settings are compared, and at which ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from loratune.adapters.config import AdapterConfig, LayerShape
from loratune.adapters.lora.config import LoRAConfig
from loratune.adapters.registry import variant_names
from loratune.compare.matching import match_ranks, parse_match
from loratune.compare.settings import Setting, named_settings
from loratune.config.recipes.variant_settings import variant_settings
from loratune.config.schema import CompareConfig, RunConfig, TargetsConfig, TrainerConfig
from loratune.counting.parameters import VariantCount, count_variant
from loratune.errors import ConfigError, LoratuneError
from loratune.models.architectures import Architecture, architecture_from_numbers
from loratune.targets.find import find_targets

OPT = {
    "model_type": "opt", "vocab_size": 740, "hidden_size": 128, "word_embed_proj_dim": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 512,
    "max_position_embeddings": 256, "do_layer_norm_before": True, "tie_word_embeddings": True,
}  # fmt: skip
CHOSEN = LoRAConfig(rank=8)


def recipe(adapter: AdapterConfig = CHOSEN, **compare: Any) -> RunConfig:
    """A recipe whose targets are all linear layers."""
    return RunConfig(
        adapter=adapter,
        targets=TargetsConfig(modules="all_linear"),
        trainer=TrainerConfig(steps=100),
        compare=CompareConfig(**compare),
    )


RECIPE = recipe()


@pytest.fixture
def opt() -> Architecture:
    return architecture_from_numbers(OPT)


def at(found: list[Setting], match: str, opt: Architecture) -> list[Setting]:
    def layers(targets: TargetsConfig) -> Sequence[LayerShape]:
        return find_targets(opt.layers, targets, CHOSEN, "opt").shapes

    return match_ranks(found, match, RECIPE, opt, layers)


def count(one: Setting, opt: Architecture, rank: int | None = None) -> VariantCount:
    layers = find_targets(opt.layers, TargetsConfig(modules="all_linear"), CHOSEN, "opt").shapes
    config = one.config if rank is None else replace(one.config, rank=rank)
    return count_variant(opt.base_parameters, layers, config)


def test_all_means_every_variant_with_its_own_numbers() -> None:
    found = named_settings("all", RECIPE)
    assert [one.label for one in found] == list(variant_names())
    for one in found:
        if one.label != "lora":
            assert one.config == variant_settings(one.label)


def test_the_recipes_adapter_stands_for_its_variant() -> None:
    [one] = named_settings(["lora"], recipe(LoRAConfig(rank=3, init="svd")))
    assert one.config == LoRAConfig(rank=3, init="svd")


def test_settings_of_one_variant_can_be_compared_with_each_other() -> None:
    found = named_settings(
        ["lora", {"variant": "lora", "rank": 32}, {"variant": "lora", "rank": 32, "rslora": True}],
        RECIPE,
    )
    assert [one.label for one in found] == ["lora_r8", "lora_r32", "lora_r32_2"]
    assert [one.config.rank for one in found] == [8, 32, 32]
    assert getattr(found[2].config, "rslora", None) is True


@pytest.mark.parametrize(
    ("wanted", "cause"),
    [
        (["lorra"], "no adapter variant named 'lorra'"),
        ([{"variant": "vera", "lr_ratio": 3}], "vera has no setting 'lr_ratio'"),
        ([{"variant": "lora", "rank": "many"}], "many"),
        ([{"variant": "lora", "rank": 0}], "0 is too small"),
        ([{"rank": 8}], "no adapter variant named ''"),
        ([], "no variant is named"),
    ],
)
def test_a_setting_that_does_not_exist_is_refused(wanted: object, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause) as refused:
        named_settings(wanted, RECIPE)
    assert refused.value.exit_code == 2


def test_every_wrong_setting_is_told_at_once() -> None:
    with pytest.raises(LoratuneError) as refused:
        named_settings(["lorra", "verra"], RECIPE)
    assert len(refused.value.lines()) == 2


def test_own_ranks_stay_and_rank_gives_all_the_same(opt: Architecture) -> None:
    found = named_settings("all", RECIPE)
    assert at(found, "own", opt) == found
    ranked = [one for one in found if "rank" not in one.config.without_effect]
    assert len(ranked) > 4
    assert {one.config.rank for one in at(ranked, "rank", opt)} == {8}
    assert len(at(found, "rank", opt)) == len(found)


@pytest.mark.parametrize("quantity", ["trainable", "bytes"])
def test_matching_gives_each_the_highest_rank_within_what_the_recipe_takes(
    opt: Architecture, quantity: str
) -> None:
    found = named_settings(["lora", "lora_fa", "lora_plus", "vera"], RECIPE)
    attribute = {"trainable": "trainable", "bytes": "stored_bytes"}[quantity]
    limit = getattr(count(found[0], opt), attribute)
    for one in at(found, quantity, opt):
        assert getattr(count(one, opt), attribute) <= limit
        assert getattr(count(one, opt, one.config.rank + 1), attribute) > limit


def test_matching_by_trained_numbers_doubles_the_rank_of_half_an_adapter(opt: Architecture) -> None:
    [fa] = at(named_settings(["lora_fa"], RECIPE), "trainable:73728", opt)
    assert fa.config.rank == 16


def test_a_rank_beyond_the_layers_width_is_noted(opt: Architecture) -> None:
    [vera] = at(named_settings(["vera"], RECIPE), "trainable", opt)
    assert vera.config.rank > 128
    assert any("128" in note for note in vera.notes)


def test_a_budget_that_some_cannot_keep_is_contradictory(opt: Architecture) -> None:
    with pytest.raises(ConfigError, match="lora cannot stay within 100 trained numbers") as refused:
        at(named_settings(["lora"], RECIPE), "trainable:100", opt)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("text", ["ranks", "trainable:", "bytes:many", "trainable:0", ""])
def test_an_unknown_way_to_match_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_match(text)
    assert refused.value.where == "match"
