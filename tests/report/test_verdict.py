"""A comparison's page says which variant to choose, and how sure that is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loratune.compare.result import Comparison, Estimate
from loratune.report.comparison_page import comparison_page
from loratune.report.comparison_verdict import verdict

from .planted import comparison


def test_the_cheapest_that_is_shown_to_be_as_good_is_chosen() -> None:
    # The base has 4.25, so as good is 0.038 more; the planted intervals are ± 0.03.
    found = verdict(comparison({"lora": 0.412, "lora_fa": 0.408, "lora_plus": 0.405, "vera": 0.63}))
    assert found.best == "lora_plus"
    assert set(found.tied) == {"lora", "lora_fa"}
    assert found.choice == "lora_fa"  # the smallest file and optimizer state of the three
    assert found.worse == ("vera",)
    text = " ".join(found.sentences)
    assert "Choose lora_fa" in text
    assert "are as good (by the 95 % interval, 99% of what training gained is kept)" in text
    assert "vera is significantly worse than lora_plus, by 0.225 nats per token" in text


def test_one_as_good_that_costs_no_less_is_named() -> None:
    found = verdict(comparison({"lora": 0.400, "lora_plus": 0.405}))
    assert found.choice == "lora"
    assert "; lora_plus is as good" in found.sentences[0]
    assert found.sentences[0].endswith("is kept), but no cheaper.")


def test_a_significant_difference_within_the_margin_is_not_called_worse() -> None:
    whole = comparison({"lora": 0.400, "lora_plus": 0.405}, significant_gap=0.001)
    rows = {row[0]: row for row in comparison_page(whole, "").sections[0].tables[0].rows}
    assert rows["lora_plus"][3].startswith("higher, yet as good\np = ")


def test_shares_beyond_the_possible_are_not_shown() -> None:
    whole = comparison({"lora": 0.40})
    (variant,) = whole.variants
    wide = {**variant.estimates, "exact_match": Estimate(mean=0.97, low=0.9, high=1.04, seeds=3)}
    page = comparison_page(replace(whole, variants=[replace(variant, estimates=wide)]), "")
    assert page.sections[0].tables[0].rows[0][4] == "97.0%\n90.0% to 100.0%"


def test_no_difference_found_is_not_taken_for_equality() -> None:
    found = verdict(comparison({"lora": 0.40, "lora_fa": 0.42}))
    assert (found.best, found.choice, found.tied) == ("lora", "lora", ("lora_fa",))
    text = " ".join(found.sentences)
    assert "lora_fa is not significantly different from lora, which does not prove" in text
    assert "lora_fa may have up to 0.05 nats per token more loss" in text
    assert "as good would be 0.039" in text


def test_a_clear_winner_is_chosen_whatever_it_costs() -> None:
    found = verdict(comparison({"lora": 0.2, "lora_fa": 0.5, "vera": 0.6}))
    assert (found.best, found.choice, found.tied) == ("lora", "lora", ())
    assert found.sentences[0].startswith("Choose lora: it has the lowest loss, 0.2 nats per token")


@pytest.mark.parametrize(
    "order", [{"lora": 0.400, "lora_fa": 0.405}, {"lora_fa": 0.405, "lora": 0.400}]
)
def test_the_order_of_a_pair_does_not_matter(order: dict[str, float]) -> None:
    found = verdict(comparison(order))
    assert (found.best, found.choice) == ("lora", "lora_fa")


def test_few_seeds_and_few_prompts_are_named_as_weaknesses() -> None:
    weak = " ".join(verdict(comparison(seeds=1, prompts=12)).cautions)
    assert "Only 1 seed:" in weak
    assert "Only 12 prompts" in weak
    assert verdict(comparison()).cautions == ()


@pytest.mark.parametrize("losses", [{"lora": 0.4, "vera": 0.6}, {"vera": 0.6, "lora": 0.4}])
def test_how_much_worse_is_given_with_its_interval(losses: dict[str, float]) -> None:
    text = " ".join(verdict(comparison(losses)).sentences)
    assert "worse than lora, by 0.2 nats per token (95 % interval 0.17 to 0.23, p = " in text


def test_a_better_exact_match_of_another_variant_is_not_kept_back() -> None:
    whole = comparison({"lora": 0.400, "lora_fa": 0.405}, significant_gap=0.001)
    quiet = [replace(d, significant=False) if d.metric == "loss" else d for d in whole.differences]
    found = verdict(replace(whole, differences=quiet))
    assert found.choice == "lora_fa"
    assert "By exact match, though, significantly better than lora_fa: lora (+0.5%)." in (
        found.sentences
    )


def test_failed_members_and_variants_are_named_with_their_reason() -> None:
    whole = comparison()
    lora, lora_fa, *others = whole.variants
    broken = replace(lora, reason="no usable learning rate", estimates={})
    member = replace(lora_fa.members[0], reason="training diverged")
    partly = replace(lora_fa, members=[member, *lora_fa.members[1:]])
    text = " ".join(verdict(replace(whole, variants=[broken, partly, *others])).cautions)
    assert "lora failed and is left out: no usable learning rate" in text
    assert "lora_fa, seed 0 failed: training diverged" in text


def test_with_nothing_measured_there_is_nothing_to_choose() -> None:
    whole = comparison()
    empty = [replace(v, estimates={}, members=[], reason="out of memory") for v in whole.variants]
    found = verdict(replace(whole, variants=empty, differences=[]))
    assert found.choice is None
    assert "nothing to choose" in found.sentences[0]


def test_untested_pairs_are_not_called_equal_in_silence() -> None:
    found = verdict(replace(comparison(), differences=[]))
    assert any(line.startswith("Not tested against the best:") for line in found.cautions)


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
    assert rows["lora"][2:4] == ("0.4\n0.38 to 0.425", "lowest")
    assert rows["vera"][2] == "0.6\n0.58 to 0.625"
    assert rows["vera"][3] == "worse\np = 0.0024"
    assert rows["base, unadapted"][2] == "4.25"


def test_an_interval_that_was_not_measured_is_not_invented() -> None:
    whole = comparison({"lora": 0.40})
    (variant,) = whole.variants
    bare = {**variant.estimates, "loss": Estimate(mean=0.4, low=None, high=None, seeds=1)}
    page = comparison_page(replace(whole, variants=[replace(variant, estimates=bare)]), "")
    assert page.sections[0].tables[0].rows[0][2] == "0.4"
