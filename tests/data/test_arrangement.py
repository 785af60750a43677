"""Whether rows share sequences: what is asked, what the model takes, what dropout forbids."""

from __future__ import annotations

from typing import Any

import pytest
from support.tiny_models import tiny_opt, tiny_rwkv

from loratune.adapters.registry import config_class
from loratune.config.schema import DataConfig, ModelConfig, RunConfig, TrainerConfig
from loratune.data.arrangement import Arrangement, arrange
from loratune.data.encoded_rows import EncodedRow
from loratune.errors import ConfigError


def rows(common: int = 20) -> list[EncodedRow]:
    """Six rows of 26 tokens that begin with ``common`` equal ones."""
    start = list(range(10, 10 + common))
    own = [list(range(100 + 30 * n, 126 - common + 30 * n)) for n in range(6)]
    return [EncodedRow([*start, *ids], ((20, 26),), 20, "rows") for ids in own]


def recipe(dropout: float = 0.0, **data: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path="base"),
        data=DataConfig(path="rows", max_length=64, **data),
        trainer=TrainerConfig(steps=1),
        adapter=config_class("lora")(dropout=dropout),
    )


@pytest.mark.parametrize(
    ("asked", "dropout", "share", "said"),
    [
        ("auto", 0.0, "auto", ""),
        ("auto", 0.1, "never", "one mask for all its rows"),
        (True, 0.0, "always", ""),
        (True, 0.1, "always", "one dropout mask for all"),
        (False, 0.0, "never", ""),
        (False, 0.1, "never", ""),
    ],
)
def test_rows_share_where_it_is_asked_and_dropout_leaves_it_exact(
    asked: Any, dropout: float, share: str, said: str
) -> None:
    arrangement, notes = arrange(recipe(dropout, share_prefixes=asked), tiny_opt(), 3, rows())
    assert arrangement == Arrangement(3, share=share)
    assert (said in " ".join(notes)) if said else notes == []


def test_dropout_of_the_base_itself_counts_too() -> None:
    arrangement, notes = arrange(recipe(), tiny_opt(dropout=0.1), 3, rows())
    assert arrangement.share == "never" and "dropout" in notes[0]


def test_rows_with_little_in_common_stay_alone() -> None:
    arrangement, notes = arrange(recipe(), tiny_opt(), 3, rows(common=2))
    assert arrangement == Arrangement(3) and notes == []


def test_packing_and_sharing_go_together() -> None:
    arrangement, _ = arrange(recipe(packing=True), tiny_opt(), 3, rows())
    assert arrangement == Arrangement(3, packed=64, share="auto")
    assert arrangement.batch(rows()).computed == 20 + 6 * 6


@pytest.mark.parametrize("key", ["packing", "share_prefixes"])
def test_a_model_that_computes_them_otherwise_refuses_what_is_asked(key: str) -> None:
    model = tiny_rwkv().eval()
    with pytest.raises(ConfigError, match="otherwise than single ones") as refused:
        arrange(recipe(**{key: True}), model, 3, rows())
    assert refused.value.where == f"data.{key}=true"
    arrangement, notes = arrange(recipe(), model, 3, rows())
    assert arrangement == Arrangement(3) and notes == []
