"""A comparison's page shows the verdict, the tables and whatever else was measured."""

from __future__ import annotations

from dataclasses import replace

from loratune.compare.result import Comparison, Estimate, Trial
from loratune.compare.verdict import verdict
from loratune.report.comparison_page import comparison_page

from .planted import comparison


def test_the_page_says_what_terminal_and_files_say() -> None:
    whole = comparison(seeds=1, prompts=12)
    page = comparison_page(whole, "")
    assert [*page.verdict, *page.warnings] == verdict(whole).findings


def test_rates_that_failed_are_drawn_and_time_is_a_cost() -> None:
    whole = comparison({"lora": 0.40, "vera": 0.60})
    first, *others = whole.variants
    hot = Trial(lr=0.5, lr_ratio=None, steps=60, loss=None, reason="diverged at step 3")
    seconds = Estimate(mean=0.5, low=None, high=None, seeds=3)
    timed = replace(
        first, search=[*first.search, hot], estimates={**first.estimates, "step_seconds": seconds}
    )
    page = comparison_page(replace(whole, variants=[timed, *others], steps=60), "")
    charts = {c.title: c for section in page.sections for c in section.charts}
    values = [row for t, c in charts.items() if "sensitivity" in t for row in c.values.rows]
    assert ("0.5", "failed: diverged at step 3", "") in values
    times = {row[0]: row[1] for row in charts["Quality against time"].values.rows}
    assert times["lora"] == "30 s"


def test_a_significant_difference_within_the_margin_is_not_called_worse() -> None:
    whole = comparison({"lora": 0.400, "lora_plus": 0.405}, significant_gap=0.001)
    rows = {row[0]: row for row in comparison_page(whole, "").sections[0].tables[0].rows}
    assert rows["lora_plus"][-1].startswith("higher, yet as good\n(p ")


def test_shares_beyond_the_possible_are_not_shown() -> None:
    whole = comparison({"lora": 0.40})
    (variant,) = whole.variants
    wide = {**variant.estimates, "exact_match": Estimate(mean=0.97, low=0.9, high=1.04, seeds=3)}
    page = comparison_page(replace(whole, variants=[replace(variant, estimates=wide)]), "")
    assert page.sections[0].tables[0].rows[0][3] == "97.0%\n[90.0%, 100.0%]"


def stripped(whole: Comparison) -> Comparison:
    """A comparison that measured losses only."""
    variants = [
        replace(v, estimates={"loss": v.estimates["loss"]}, search=[], members=[])
        for v in whole.variants
    ]
    return replace(whole, variants=variants, samples=[], differences=[], findings=[], recipe={})


def test_a_page_is_made_of_whatever_was_measured() -> None:
    page = comparison_page(stripped(comparison()), "")
    assert [s.anchor for s in page.sections if not s.empty] == [
        "quality", "cost", "pareto", "settings", "provenance"
    ]  # fmt: skip


def test_the_quality_table_shows_means_intervals_and_tests() -> None:
    page = comparison_page(comparison({"lora": 0.40, "vera": 0.60}), "")
    rows = {row[0]: row for row in page.sections[0].tables[0].rows}
    assert (rows["lora"][2], rows["lora"][-1]) == ("0.4000\n[0.3800, 0.4250]", "lowest")
    assert rows["vera"][2] == "0.6000\n[0.5800, 0.6250]"
    assert rows["vera"][-1] == "worse\n(p 0.002)"
    assert rows["(base)"][2] == "4.2500"


def test_an_interval_that_was_not_measured_is_not_invented() -> None:
    whole = comparison({"lora": 0.40})
    (variant,) = whole.variants
    bare = {**variant.estimates, "loss": Estimate(mean=0.4, low=None, high=None, seeds=1)}
    page = comparison_page(replace(whole, variants=[replace(variant, estimates=bare)]), "")
    assert page.sections[0].tables[0].rows[0][2] == "0.4000"
