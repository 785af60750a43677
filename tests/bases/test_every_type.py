"""Every causal-LM type of transformers works, or is refused before the first step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bases.tiny_base import all_types, multimodal_types


@pytest.mark.bases
@pytest.mark.parametrize("name", all_types())
def test_a_type_works_or_is_refused_in_words(
    name: str, trial: Callable[[str], dict[str, str]]
) -> None:
    record = trial(name)
    assert record["verdict"] != "fails", record["reason"]


@pytest.mark.bases
@pytest.mark.parametrize("name", multimodal_types())
def test_text_of_a_multimodal_type_works_or_is_refused_in_words(
    name: str, trial: Callable[..., dict[str, str]]
) -> None:
    record = trial(name, multimodal=True)
    assert record["verdict"] != "fails", record["reason"]
