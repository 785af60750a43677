"""An adapter goes onto the base it was trained on, or onto another by permission alone."""

from __future__ import annotations

import pytest

from loratune.errors import CheckpointError, MergeError, SeveralErrors
from loratune.runs.drift import Change, check_binding, check_drift, recipe_changes

OWN = {"base": "b" * 64, "tokenizer": "a" * 64}


def test_changes_that_are_allowed_are_returned_and_the_others_raised_together() -> None:
    changes = [Change("adapter.rank", 4, 8), Change("trainer.lr", 1, 2), Change("base", "x", "y")]
    assert check_drift(changes, ["adapter", "trainer.lr", "base"], where="here") == [
        "adapter.rank: 4 → 8", "trainer.lr: 1 → 2", "base: x → y",
    ]  # fmt: skip
    with pytest.raises(SeveralErrors) as caught:
        check_drift(changes, ["trainer"], where="here")
    assert [error.cause for error in caught.value.errors] == ["adapter.rank: 4 → 8", "base: x → y"]


def bind(recorded: dict[str, str], base: str, tokenizer: str, *allowed: str) -> list[str]:
    return check_binding(recorded, base, tokenizer, allowed, where="adapter", error=MergeError)


def test_an_adapter_fits_its_own_base_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert bind(OWN, OWN["base"], OWN["tokenizer"]) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("key", OWN)
def test_another_base_or_tokenizer_needs_permission(
    key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    now = OWN | {key: "c" * 64}
    with pytest.raises(MergeError, match=f"{key}: {OWN[key][:12]} → {'c' * 12};") as caught:
        bind(OWN, now["base"], now["tokenizer"])
    assert f"allow_drift=[{key}]" in caught.value.fix
    line = f"{key}: {OWN[key][:12]} → {'c' * 12}"
    assert bind(OWN, now["base"], now["tokenizer"], key) == [line]
    assert f"drift allowed: {line}" in capsys.readouterr().out


def test_an_adapter_of_another_tool_fits_any_base_with_a_note(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check_binding({}, "b" * 64, None, [], where="adapter", error=CheckpointError) == []
    assert "does not say which base" in capsys.readouterr().out


def recipe(**data: object) -> dict[str, object]:
    return {"adapter": {"variant": "lora", "rank": 8}, "data": data}


def test_a_setting_newer_than_the_record_had_its_default() -> None:
    recorded = recipe(max_length=64)
    assert recipe_changes(recorded, recipe(max_length=64, learn="all")) == []
    assert recipe_changes(recorded, recipe(max_length=64, learn="last")) == [
        Change("data.learn", "all", "last")
    ]
    assert recipe_changes(recorded, recipe(max_length=64, columns={"prompt": "q"})) == [
        Change("data.columns.prompt", None, "q")
    ]


def test_sources_are_compared_by_name_and_not_by_place() -> None:
    saved = recipe(sources=[{"path": "a.jsonl", "weight": 2.0, "columns": {"path": "x"}}])
    moved = recipe(sources=[{"path": "/b/a.jsonl", "name": "a", "weight": 2.0,
                             "columns": {"path": "x"}}])  # fmt: skip
    assert recipe_changes(saved, moved) == []
    other = recipe(sources=[{"path": "a.jsonl", "weight": 3.0, "columns": {"path": "y"}}])
    assert recipe_changes(saved, other) == [
        Change("data.sources.a.columns.path", "x", "y"),
        Change("data.sources.a.weight", 2.0, 3.0),
    ]
