"""Contenders: a label and what it changes of the recipe, in a file or on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loratune.adapters.config import LayerKind, LayerShape
from loratune.adapters.full.config import FullConfig
from loratune.adapters.lora.config import LoRAConfig
from loratune.adapters.registry import config_class, variant_names
from loratune.compare.plan import ComparisonPlan, VariantSearch
from loratune.compare.prepare import prepare
from loratune.compare.search import Point, plan_search
from loratune.compare.settings import Options, Setting, named_settings
from loratune.compare.store import Store, fingerprint
from loratune.config.convert import to_plain
from loratune.config.schema import CompareConfig, RunConfig, TargetsConfig, TrainerConfig
from loratune.errors import ConfigError, LoratuneError, ModelError

Make = Callable[..., RunConfig]
OWN = LoRAConfig(rank=8, init="svd")


def recipe(**contenders: Any) -> RunConfig:
    return RunConfig(
        adapter=OWN,
        targets=TargetsConfig(modules="attention", exclude=["k_proj"]),
        trainer=TrainerConfig(steps=100, lr=1e-3),
        compare=CompareConfig(steps=40, contenders=contenders),
    )


def named(**contenders: Any) -> dict[str, Setting]:
    return {one.label: one for one in named_settings(None, recipe(**contenders))}


def test_a_contender_changes_what_it_names_and_nothing_else() -> None:
    common = recipe()
    found = named(
        narrow={"adapter": "lora", "adapter.rank": 4},
        yardstick={"adapter": "full"},
        feedforward={"targets": "mlp"},
        large={"trainer.batch_size": 32},
        own={},
    )
    assert list(found) == ["narrow", "yardstick", "feedforward", "large", "own"]
    assert found["narrow"].config == replace(OWN, rank=4)
    assert isinstance(found["yardstick"].config, FullConfig)
    assert found["feedforward"].recipe.targets == TargetsConfig(modules="mlp")
    large = replace(found["large"].recipe, compare=common.compare)
    assert large == replace(common, trainer=replace(common.trainer, batch_size=32))
    assert found["own"].config == OWN
    assert found["narrow"].changes == {}
    assert found["large"].changes == {"trainer.batch_size": 32}
    assert found["feedforward"].changes == {"targets.modules": "mlp", "targets.exclude": []}


def test_the_short_form_is_the_same_setting() -> None:
    [long] = named(a={"adapter": "vera", "adapter.rank": 32, "adapter.d_initial": 1.0}).values()
    [short] = named_settings([{"variant": "vera", "rank": 32, "d_initial": 1.0}], recipe())
    assert (short.config, short.changes) == (long.config, long.changes)


@pytest.mark.parametrize(
    "nested",
    [
        {"adapter": {"variant": "vera", "rank": 32}},
        {"adapter.variant": "vera", "adapter": {"rank": 32}},
    ],
)
def test_nested_settings_are_dotted_ones(nested: dict[str, Any]) -> None:
    dotted = named(a={"adapter": "vera", "adapter.rank": 32})
    assert named(a=nested)["a"].config == dotted["a"].config


def test_names_choose_among_contenders_and_variants() -> None:
    common = recipe(narrow={"adapter.rank": 2}, wide={"adapter.rank": 64})
    chosen = named_settings(["wide", "vera"], common)
    assert [(one.label, one.config.rank) for one in chosen] == [("wide", 64), ("vera", 256)]
    assert [one.label for one in named_settings("wide", common)] == ["wide"]
    assert [one.label for one in named_settings("all", common)] == list(variant_names())


def test_a_length_of_its_own_replaces_the_common_one() -> None:
    found = named(short={"trainer.epochs": 1}, long={"compare.steps": 80})
    assert found["short"].recipe.trainer.steps is None
    assert found["short"].recipe.compare.steps is None
    assert found["short"].changes["trainer.epochs"] == 1
    assert found["long"].changes == {"compare.steps": 80}


def test_the_rate_says_where_the_search_begins_and_changes_no_training() -> None:
    assert named(a={"trainer.lr": 3e-4, "compare.lr_points": 1})["a"].changes == {}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"adapter": "lorra"}, ["no adapter variant named 'lorra'", "did you mean 'lora'"]),
        ({"adapter.rnak": 3}, ["lora has no setting 'rnak'", "did you mean 'rank'"]),
        ({"adapter.rank": 0}, ["0 is too small"]),
        ({"adapter": "full", "adapter.rank": 3}, ["'adapter.rank' has no effect with full"]),
        ({"targets": "attentoin"}, ["no targets named 'attentoin'", "did you mean 'attention'"]),
        ({"targets.modlues": "mlp"}, ["targets has no setting 'modlues'"]),
        ({"trainer.batch_size": 0}, ["0 is out of range", "trainer.batch_size"]),
        ({"trainer.steps": 5, "trainer.epochs": 1}, ["exclude each other"]),
        ({"trainer.seed": 5}, ["'trainer.seed' is the same for all contenders"]),
        ({"compare.seeds": 5}, ["'compare.seeds' is the same for all contenders"]),
        ({"trainer": "default"}, ["'trainer: default' has no effect"]),
        ({"data.limit": 5}, ["no setting 'data.limit'", "the same for all"]),
    ],
)
def test_a_wrong_contender_is_refused_by_its_name(
    overrides: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(LoratuneError) as refused:
        named(mine=overrides, fine={"adapter.rank": 2})
    [line] = refused.value.lines()
    assert refused.value.exit_code == 2
    assert "compare.contenders.mine" in line
    for word in words:
        assert word in line


@pytest.mark.parametrize("label", ["../up", "a b", "", "-x", "x" * 61, "ä"])
def test_a_label_names_files(label: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a contender"):
        named(**{label: {"adapter.rank": 2}})


def plan_of(tmp_path: Path, settings: list[Setting]) -> ComparisonPlan:
    search = plan_search(1e-3, 40, points=3, factor=2.0, rungs=1)
    searches = [VariantSearch(one, search) for one in settings]
    return ComparisonPlan(Store(tmp_path), "shared", searches, [0, 1])


def test_results_of_a_setting_have_the_key_that_they_always_had(tmp_path: Path) -> None:
    [plain] = named_settings(["lora"], recipe())
    plan, point = plan_of(tmp_path, [plain]), Point(1e-3)
    config = to_plain(replace(OWN, lr=1e-3))
    assert plan.trial(plain, point, 40).cached.key == fingerprint(["shared", "trial", config, 40])
    assert plan.seed_run(plain, point, 1).cached.key == fingerprint(["shared", "member", config, 1])
    assert plan.costs(plain).cached.key == fingerprint(["shared", "costs", to_plain(OWN)])


def test_whatever_changes_a_training_changes_its_key(tmp_path: Path) -> None:
    found = named(
        own={},
        rank={"adapter.rank": 2},
        decayed={"trainer.weight_decay": 0.1},
        mlp={"targets": "mlp"},
        longer={"compare.steps": 80},
    )
    plan = plan_of(tmp_path, list(found.values()))
    keys = {plan.seed_run(one, Point(1e-3), 0).cached.key for one in found.values()}
    assert len(keys) == len(found)


def test_two_contenders_that_are_one_are_refused_before_the_base_is_read(tiny: Make) -> None:
    same = {"first": {"adapter.rank": 4}, "second": {"adapter": {"rank": 4}}}
    config = tiny(
        model=replace(tiny().model, path="/nowhere"), compare=CompareConfig(contenders=same)
    )
    with pytest.raises(ConfigError, match="first and second are one setting"):
        prepare(config, Options())


def test_contenders_that_a_budget_makes_one_are_refused_too(tiny: Make) -> None:
    ranks = {"narrow": {"adapter.rank": 2}, "wide": {"adapter.rank": 8}}
    config = tiny(compare=CompareConfig(contenders=ranks, lr_points=1))
    with pytest.raises(ConfigError, match="narrow and wide are one setting"):
        prepare(config, Options(match="rank"))


def test_targets_that_name_nothing_are_told_with_the_contender(tiny: Make) -> None:
    config = tiny(
        compare=CompareConfig(contenders={"fine": {}, "lost": {"targets.modules": ["w9"]}})
    )
    with pytest.raises(ModelError, match="w9") as refused:
        prepare(config, Options())
    assert "lost" in refused.value.where


def test_a_budget_matches_over_each_contenders_own_layers(tiny: Make) -> None:
    both = {"attention": {"targets": "attention"}, "mlp": {"targets": "mlp"}}
    config = tiny(adapter=LoRAConfig(rank=33), compare=CompareConfig(contenders=both, lr_points=1))
    bench, plan = prepare(config, Options(match="trainable:135168"))
    counts = {}
    for one in plan.searches:
        layers: tuple[LayerShape, ...] = bench.layers(one.setting.recipe.targets)
        rank = one.setting.config.rank
        counts[one.setting.label] = sum(rank * (s.in_features + s.out_features) for s in layers)
    # 16 layers of 128 x 128, and 8 of 128 x 512.
    assert counts == {"attention": 33 * 16 * 256, "mlp": 26 * 8 * 640}


def test_of_all_variants_those_that_refuse_the_layers_are_left_out(
    tiny: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(targets=TargetsConfig(modules=["embed_tokens"]))
    _, plan = prepare(config, Options())
    labels = {one.setting.label for one in plan.searches}
    refusing = {
        name
        for name in variant_names()
        if config_class(name)().check_layer(LayerShape("e", LayerKind.embedding, 512, 128), 8)
    }
    assert refusing and labels == set(variant_names()) - refusing
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"note: {name} is left out: " in said for name in refusing)
    with pytest.raises(LoratuneError, match="embedding"):
        prepare(config, Options(variants=sorted(refusing)))
