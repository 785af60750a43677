"""Which variant a comparison speaks for, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from report.planted import comparison

from loratune.compare.result import Comparison, VariantResult
from loratune.compare.verdict import Choice, Verdict, verdict


def judged(whole: Comparison) -> tuple[Verdict, Choice]:
    """The verdict, and its choice, which must be there."""
    answer = verdict(whole)
    assert answer.choice is not None
    return answer, answer.choice


def labels(variants: Sequence[VariantResult]) -> set[str]:
    return {variant.label for variant in variants}


def test_the_cheapest_that_is_shown_to_be_as_good_is_chosen() -> None:
    # The base has 4.25, so as good is 0.038 more; the planted intervals are ± 0.03.
    losses = {"lora": 0.412, "lora_fa": 0.408, "lora_plus": 0.405, "vera": 0.63}
    found, choice = judged(comparison(losses))
    assert choice.best.label == "lora_plus"
    assert labels(choice.as_good) == {"lora", "lora_fa"}
    assert choice.chosen.label == "lora_fa"  # the smallest file and optimizer state of the three
    assert labels(choice.worse) == {"vera"}
    text = " ".join(found.sentences)
    assert "Choose lora_fa" in text
    assert "are as good (by the 95 % interval, 99% of what training gained is kept)" in text
    assert "vera is significantly worse than lora_plus, by 0.225 nats per token" in text


def test_one_as_good_that_costs_no_less_is_named() -> None:
    found, choice = judged(comparison({"lora": 0.400, "lora_plus": 0.405}))
    assert choice.chosen.label == "lora"
    assert "; lora_plus is as good" in found.sentences[0]
    assert found.sentences[0].endswith("is kept), but no cheaper.")


def test_no_difference_found_is_not_taken_for_equality() -> None:
    found, choice = judged(comparison({"lora": 0.40, "lora_fa": 0.42}))
    assert (choice.best.label, choice.chosen.label) == ("lora", "lora")
    assert (labels(choice.undecided), choice.as_good) == ({"lora_fa"}, ())
    text = " ".join(found.sentences)
    assert "lora_fa is not significantly different from lora, which does not prove" in text
    assert "lora_fa may have up to 0.05 nats per token more loss" in text
    assert "as good would be 0.038" in text


def test_a_clear_winner_is_chosen_whatever_it_costs() -> None:
    found, choice = judged(comparison({"lora": 0.2, "lora_fa": 0.5, "vera": 0.6}))
    assert (choice.best.label, choice.chosen.label) == ("lora", "lora")
    assert (choice.as_good, choice.undecided) == ((), ())
    assert found.sentences[0].startswith("Choose lora: it has the lowest loss, 0.2 nats per token")


@pytest.mark.parametrize(
    "order", [{"lora": 0.400, "lora_fa": 0.405}, {"lora_fa": 0.405, "lora": 0.400}]
)
def test_the_order_of_a_pair_does_not_matter(order: dict[str, float]) -> None:
    _, choice = judged(comparison(order))
    assert (choice.best.label, choice.chosen.label) == ("lora", "lora_fa")


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
    found, choice = judged(replace(whole, differences=quiet))
    assert choice.chosen.label == "lora_fa"
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


@pytest.mark.parametrize("seeds", [1, 2, 3])
@pytest.mark.parametrize("prompts", [99, 100])
def test_every_threshold_is_said_once(seeds: int, prompts: int) -> None:
    cautions = verdict(comparison(seeds=seeds, prompts=prompts)).cautions
    assert sum("seed" in line for line in cautions) == (seeds < 3)
    assert sum("prompts" in line for line in cautions) == (prompts < 100)


def test_nothing_is_recommended_among_those_that_do_not_differ_significantly() -> None:
    whole = comparison({"lora": 0.40, "lora_fa": 0.42, "vera": 0.43})
    lines = verdict(whole).findings
    [recommendation] = [line for line in lines if "cheapest" in line or line.startswith("Choose")]
    assert recommendation.startswith("Choose lora: it has the lowest loss")
    assert not any("significantly so" in line or "fewest" in line for line in lines)


def test_what_is_noted_of_settings_and_rows_weakens_the_verdict() -> None:
    whole = comparison()
    first, *others = whole.variants
    noted = replace(
        whole,
        variants=[replace(first, notes=["its best rate is the last one tried"]), *others],
        rows=replace(whole.rows, notes=["2 dev rows were left out"]),
    )
    assert verdict(noted).cautions == (
        "lora: its best rate is the last one tried.",
        "2 dev rows were left out",
    )


def test_exact_match_of_none_or_all_is_called_saturated() -> None:
    whole = comparison()
    exact = whole.variants[0].estimates["exact_match"]
    none = [
        replace(v, estimates={**v.estimates, "exact_match": replace(exact, mean=0.0)})
        for v in whole.variants
    ]
    assert any("saturated" in line for line in verdict(replace(whole, variants=none)).cautions)
