"""A sample of decoders of encoder models, of models with windows or images, and of refused ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

TYPES = [
    "bart",
    "bert",
    "gemma3",
    "llama4_text",
    "mistral",
]


@pytest.mark.parametrize("name", TYPES)
def test_a_type_works(name: str, trial: Callable[[str], dict[str, str]]) -> None:
    record = trial(name)
    assert record["verdict"] == "works", record["reason"]


@pytest.mark.parametrize(("name", "said"), [("cpmant", "not causal"), ("xlnet", "not causal")])
def test_a_type_is_refused(name: str, said: str, trial: Callable[[str], dict[str, str]]) -> None:
    record = trial(name)
    assert record["verdict"] == "refused" and said in record["reason"], record["reason"]
