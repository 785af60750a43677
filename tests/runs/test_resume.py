"""Which changes since a checkpoint was saved stop a run that goes on from it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loratune.adapters.registry import config_class
from loratune.config.schema import RunConfig
from loratune.errors import CheckpointError, LoratuneError
from loratune.runs.resume import recorded_clock, resumed_facts

FACTS: dict[str, Any] = {
    "recipe": {"data": {"max_length": 64}},
    "base": "b" * 64,
    "tokenizer": "a" * 64,
    "data": "d" * 64,
    "encoded": "e" * 64,
    "clock": "2031-12-25T07:05:09",
    "versions": {},
}


def resumed(now: dict[str, Any], *allowed: str, saved: dict[str, Any] = FACTS) -> list[str]:
    checkpoint: Any = SimpleNamespace(facts=saved, path=Path("step_000001"), step=1)
    config = RunConfig(adapter=config_class("lora")(), allow_drift=list(allowed))
    drift = resumed_facts(checkpoint, {**FACTS, **now}, config)["drift"]
    assert isinstance(drift, list)
    return drift


def test_rows_encoded_otherwise_from_the_same_data_are_drift() -> None:
    with pytest.raises(CheckpointError, match="encoded: eeeeeeeeeeee → ffffffffffff"):
        resumed({"encoded": "f" * 64})
    assert len(resumed({"encoded": "f" * 64}, "encoded")) == 1


@pytest.mark.parametrize(
    ("key", "change"),
    [("data", {"data": "c" * 64}), ("data", {"recipe": {"data": {"max_length": 32}}})],
)
def test_what_changes_the_encoding_is_named_once(key: str, change: dict[str, Any]) -> None:
    with pytest.raises(LoratuneError) as caught:
        resumed({"encoded": "f" * 64, **change})
    assert len(caught.value.lines()) == 1 and "encoded" not in str(caught.value)
    assert len(resumed({"encoded": "f" * 64, **change}, key)) == 1


def test_a_checkpoint_that_never_recorded_the_encoded_rows_is_resumed() -> None:
    older = {key: value for key, value in FACTS.items() if key not in ("encoded", "clock")}
    assert resumed({}, saved=older) == []


def test_the_clock_is_the_checkpoints() -> None:
    checkpoint: Any = SimpleNamespace(facts=FACTS)
    assert recorded_clock(checkpoint) == FACTS["clock"] and recorded_clock(None) is None
