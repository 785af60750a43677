"""A sample of types with one dense block after another."""

from __future__ import annotations

from collections.abc import Callable

import pytest

TYPES = [
    "bloom",
    "falcon",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "llama",
    "opt",
    "phi3",
    "qwen3",
    "stablelm",
]


@pytest.mark.parametrize("name", TYPES)
def test_a_type_works(name: str, trial: Callable[[str], dict[str, str]]) -> None:
    record = trial(name)
    assert record["verdict"] == "works", record["reason"]
    assert record["peft"] == "equal"
