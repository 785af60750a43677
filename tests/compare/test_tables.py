"""A comparison in words and tables: what is shown is what was found, and data stays text."""

from __future__ import annotations

import csv as csv_reader
import io
from dataclasses import replace
from typing import Any

import pytest

from loratune.compare import tables
from loratune.compare.metrics import difference_in_words, verdict_word
from loratune.compare.result import (
    BaseScores,
    Comparison,
    Costs,
    Difference,
    Estimate,
    Rows,
    SeedRun,
    Trial,
    Twin,
    VariantResult,
)
from loratune.compare.verdict import verdict


def variant(label: str, loss: float, trainable: int = 1000, **more: Any) -> VariantResult:
    costs = Costs(
        rank=8, trainable=trainable, frozen=0, percent_of_base=0.5, stored_bytes=4 * trainable,
        optimizer_bytes=8 * trainable, activation_bytes_per_token=12.0,
    )  # fmt: skip
    estimates = {
        "loss": Estimate(mean=loss, low=loss - 0.01, high=loss + 0.01, seeds=3, units=48),
        "exact_match": Estimate(mean=0.5, low=-0.1, high=1.2, seeds=3, units=48),
        "peak_bytes": Estimate(mean=2e6, low=None, high=None, seeds=3),
    }
    fields: dict[str, Any] = {
        "lr": 1e-3, "estimates": estimates,
        "members": [SeedRun(seed=seed, loss=loss) for seed in range(3)],
        "search": [Trial(lr=1e-3, lr_ratio=None, steps=60, loss=loss)],
    }  # fmt: skip
    return VariantResult(label=label, variant=label, adapter={}, costs=costs, **{**fields, **more})


def difference(first: str, second: str, value: float, p: float) -> Difference:
    return Difference(
        metric="loss", first=first, second=second, difference=value, low=value - 0.01,
        high=value + 0.01, p=p, p_holm=p, significant=p < 0.05, words="",
    )  # fmt: skip


def comparison(*variants: VariantResult, **more: Any) -> Comparison:
    fields: dict[str, Any] = {
        "name": "demo", "created": "2026-01-01T00:00:00Z", "seconds": 10.0, "match": "own",
        "steps": 60, "seeds": [0, 1, 2], "target_loss": 0.1,
        "base": BaseScores(path="builtin:demo-opt", fingerprint="f", parameters=900, loss=4.3),
        "rows": Rows(train=96, dev=48, test=480, prompts=480),
    }  # fmt: skip
    return Comparison(variants=list(variants), **{**fields, **more})


def test_a_difference_that_is_not_significant_says_so_in_words() -> None:
    words = difference_in_words(difference("lora", "vera", -0.002, 0.4))
    assert words.startswith("lora and vera: no significant difference in loss: -0.0020 (95 % CI")
    assert "p 0.400 after Holm" in words


def test_a_significant_difference_names_its_way() -> None:
    assert difference_in_words(difference("lora", "vera", -0.2, 0.0004)).startswith(
        "lora has a lower loss than vera: -0.2000"
    )
    assert "higher" in difference_in_words(difference("lora", "vera", 0.2, 0.01))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"p_holm": 0.4, "significant": False}, "undecided"),
        ({"significant": True}, "lora better"),
        ({"significant": True, "difference": 0.2}, "vera better"),
        ({"metric": "exact_match", "significant": True, "difference": 0.2}, "lora better"),
        ({"metric": "exact_match", "significant": True, "difference": -0.2}, "vera better"),
        ({"metric": "forgetting", "significant": True, "difference": 0.2}, "vera better"),
        ({"equivalent": True, "margin": 0.0385}, "equivalent within 0.0385"),
        ({"equivalent": True, "significant": True, "margin": 0.0385}, "equivalent within 0.0385"),
        ({"equivalent": True, "margin": 0.009, "metric": "exact_match"},
         "equivalent within 0.9 points"),
    ],
)  # fmt: skip
def test_each_pair_is_better_equivalent_or_undecided(change: dict[str, Any], word: str) -> None:
    one = replace(difference("lora", "vera", -0.2, 0.01), **change)
    assert verdict_word(one) == word
    table = tables.difference_table(comparison(variant("lora", 0.1), differences=[one]))
    assert table.rows[0][-1] == word


def test_contenders_are_told_apart_by_what_they_change() -> None:
    narrow = variant("narrow", 0.1, overrides={"adapter": "lora", "adapter.rank": 4})
    twin = Twin(label="same", of="narrow", rate_factor=2.0, trained=False)
    table = tables.contender_table(comparison(narrow, twins=[twin]))
    assert table.rows == (
        ("narrow", "narrow", "adapter=lora, adapter.rank=4", ""),
        ("same", "", "", "not trained: the same training as narrow"),
    )
    assert tables.contender_table(comparison(variant("lora", 0.1))).rows == ()


def test_a_failed_variant_has_a_row_without_numbers() -> None:
    broken = variant("vera", 0.2, reason="diverged", estimates={}, lr=None, members=[])
    table = tables.quality_table(comparison(variant("lora", 0.1), broken))
    assert table.rows[1][:2] == ("vera", "failed")
    assert set(table.rows[1][2:-1]) == {None}
    assert table.rows[1][-1] == "failed"


def test_what_a_merge_residual_is_stands_where_one_was_measured() -> None:
    residual = {"merge_residual": Estimate(mean=0.01, low=None, high=None, seeds=3)}
    merged, plain = variant("lora", 0.5), variant("vera", 0.6)
    merged = replace(merged, estimates=merged.estimates | residual)
    assert "rounding takes away" in tables.cost_table(comparison(merged, plain)).caption
    assert "Merge residual" not in tables.cost_table(comparison(plain)).caption


def test_the_page_says_in_what_and_in_which_batches_was_trained_where_that_is_recorded() -> None:
    made = {"provenance": {"dtype": "torch.bfloat16"}, "recipe": {"trainer": {"batch_size": 3}}}
    assert ", bfloat16, batches of 3 rows;" in tables.markdown(
        comparison(variant("a", 0.5), **made)
    )
    assert "batches of" not in tables.markdown(comparison(variant("a", 0.5)))


def test_a_variant_without_a_rank_shows_none() -> None:
    found = comparison(variant("lora", 0.5), variant("full", 0.4), variant("not installed", 0.6))
    table = tables.cost_table(found)
    column = table.columns.index("rank")
    assert [row[column] for row in table.rows] == [8, None, 8]


def test_an_interval_of_a_share_stays_a_share() -> None:
    table = tables.quality_table(comparison(variant("lora", 0.1)))
    assert "50.0%\n[0.0%, 100.0%]" in table.rows[0]
    assert "0.1000\n[0.0900, 0.1100]" in table.rows[0]


HOSTILE = "<script>alert(1)</script> | **x** [y](http://z) `c`\n# head \x1b[31m"


def test_hostile_text_stays_text_in_markdown() -> None:
    broken = variant("vera", 0.2, reason=HOSTILE, estimates={})
    made = comparison(variant("lora", 0.1), broken, name=HOSTILE)
    page = tables.markdown(replace(made, findings=verdict(made).findings))
    assert "<script" not in page
    assert "\x1b" not in page
    assert "\n# head" not in page
    assert "[y](" not in page and "\\[y\\](http" in page
    [row] = [line for line in page.splitlines() if line.startswith("| vera | 0.001 | –")]
    assert row.count(" | ") == 4


def test_csv_keeps_every_number_and_every_column() -> None:
    text = tables.csv(comparison(variant("lora", 0.1), variant("vera", 0.2, 77)))
    rows = list(csv_reader.reader(io.StringIO(text)))
    costs = next(row for row in rows if row[:1] == ["vera"] and "77" in row)
    assert costs[2] == "77"
    widths = {len(row) for row in rows if row}
    assert len(widths) == 2


def test_the_search_shows_each_rate_on_each_rung() -> None:
    trials = [
        Trial(lr=1e-3, lr_ratio=None, steps=30, loss=0.5),
        Trial(lr=2e-3, lr_ratio=None, steps=30, loss=None, reason="diverged"),
        Trial(lr=1e-3, lr_ratio=None, steps=60, loss=0.25),
    ]
    table = tables.search_table(comparison(variant("lora", 0.1, search=trials)))
    assert table.rows == (
        ("lora", "0.001", "0.5000", "0.2500", "chosen"),
        ("lora", "0.002", "failed", "", "diverged"),
    )


def test_a_result_survives_the_file_format() -> None:
    made = comparison(variant("lora", 0.1), differences=[difference("lora", "vera", -0.1, 0.01)])
    assert Comparison.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"version": 2}, "version"),
        ({"format": "other"}, "loratune-comparison"),
        ({"surprise": 1}, "surprise"),
        ({"steps": "60"}, "60"),
        ({"steps": True}, "True"),
        ({"variants": [{"label": "x"}]}, "required"),
        ({"base": None}, "BaseScores"),
    ],
)
def test_a_file_that_is_no_comparison_is_refused(change: dict[str, Any], cause: str) -> None:
    values = comparison(variant("lora", 0.1)).to_dict() | change
    with pytest.raises(ValueError, match=cause):
        Comparison.from_dict(values)


@pytest.mark.parametrize(("answered", "words"), [(480, ""), (100, " (100 of them answered)")])
def test_prompts_that_nobody_answered_are_told(answered: int, words: str) -> None:
    exact = Estimate(mean=0.5, low=0.4, high=0.6, seeds=3, units=answered)
    one = variant("lora", 0.4)
    one = replace(one, estimates=one.estimates | {"exact_match": exact})
    page = tables.markdown(comparison(one))
    assert f"480 final rows with 480 prompts{words}, 0 held-out texts." in page
