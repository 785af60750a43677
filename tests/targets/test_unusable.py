"""Layers that no adapter can do anything for: left out of words, refused by name."""

from __future__ import annotations

import pytest

from loratune.adapters.config import LayerKind, LayerShape
from loratune.config.schema import TargetsConfig
from loratune.errors import LoratuneError
from loratune.targets.find import TargetMatch, find_targets

DEAD, OTHER = "without effect", "of another formula"


def linear(name: str) -> LayerShape:
    return LayerShape(name, LayerKind.linear, 8, 8, 64)


PARTS = [
    "self_attn.q_proj", "self_attn.v_proj", "cross_attn.q_proj", "cross_attn.v_proj", "mlp.router",
    "mlp.up_proj",
]  # fmt: skip
TEXT = [f"model.layers.{n}.{part}" for n in range(3) for part in PARTS]
TOWER = [f"model.tower.blocks.{n}.self_attn.{part}" for n in (0, 1) for part in ("q_proj", "fc")]
SHAPES = [linear(name) for name in (*TEXT, *TOWER)]
UNUSABLE = {
    **{name: DEAD for name in (*TEXT, *TOWER) if "cross" in name or "tower" in name},
    **{name: OTHER for name in TEXT if name.endswith("router")},
}


def find(modules: object, **settings: object) -> TargetMatch:
    targets = TargetsConfig(modules=modules, **settings)  # type: ignore[arg-type]
    others = {shape.name: "Linear" for shape in SHAPES} | {"model.norm": "RMSNorm"}
    return find_targets(SHAPES, targets, family="llama", others=others, unusable=UNUSABLE)


def test_all_linear_leaves_them_out_and_says_so_once_for_each_reason() -> None:
    found = find("all_linear")
    assert [shape.name for shape in found.shapes] == [n for n in TEXT if n not in UNUSABLE]
    assert found.counts == {"all_linear": 9}
    assert found.notices == (
        f"all_linear leaves out 10 layers {DEAD}: model.layers.*.cross_attn (6), model.tower (4)",
        f"all_linear leaves out 3 layers {OTHER}: model.layers.*.mlp.router (3)",
    )


def test_a_role_word_means_the_layers_that_work() -> None:
    found = find("attention_qv")
    assert [shape.name for shape in found.shapes] == [
        f"model.layers.{n}.self_attn.{part}" for n in range(3) for part in ("q_proj", "v_proj")
    ]
    assert "model.tower" in found.notices[0] and "cross_attn" not in found.notices[0]


def test_what_is_excluded_anyway_is_not_mentioned() -> None:
    excluded = find("all_linear", exclude=["router", "fc"], layers=[0])
    (notice,) = excluded.notices
    assert notice == (
        f"all_linear leaves out 3 layers {DEAD}: model.layers.*.cross_attn (2), "
        "model.tower.blocks.*.self_attn.q_proj (1)"
    )


@pytest.mark.parametrize("modules", [["q_proj", "router"], r".*(q_proj|router)"])
def test_named_layers_are_refused_with_every_pattern_of_names(modules: object) -> None:
    with pytest.raises(LoratuneError) as refused:
        find(modules)
    assert refused.value.exit_code == 4
    dead, other = refused.value.lines()
    assert f"5 layers {DEAD}: model.layers.*.cross_attn" in dead and "model.tower" in dead
    assert f"3 layers {OTHER}: model.layers.*.mlp.router (3)" in other
    assert "targets.exclude" in dead and "targets.exclude" in other


def test_named_layers_that_work_are_not_disturbed() -> None:
    assert len(find(["self_attn.v_proj", "up_proj"]).shapes) == 6
