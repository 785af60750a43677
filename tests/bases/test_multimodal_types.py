"""A sample of models that read images too, whole: trained on text, all else as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest

TYPES = [
    "llama4",
    "mllama",
    "qwen2_5_vl",
    "smolvlm",
]


@pytest.mark.parametrize("name", TYPES)
def test_the_text_of_a_type_works(name: str, trial: Callable[..., dict[str, str]]) -> None:
    record = trial(name, multimodal=True)
    assert record["verdict"] == "works", record["reason"]
    assert record["peft"] == "equal" and record["towers"].endswith("tensors equal")
