"""A sample of types with experts, recurrent state, convolutions or several kinds of blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

TYPES = [
    "deepseek_v3",
    "falcon_h1",
    "gpt_oss",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "mamba",
    "mixtral",
]


@pytest.mark.parametrize("name", TYPES)
def test_a_type_works(name: str, trial: Callable[[str], dict[str, str]]) -> None:
    record = trial(name)
    assert record["verdict"] == "works", record["reason"]
