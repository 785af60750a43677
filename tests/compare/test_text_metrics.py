"""Metrics of answers in a comparison, and forgetting where a loss was reached."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest

from loratune.compare.result import Comparison
from loratune.compare.run import compare
from loratune.compare.settings import Options
from loratune.compare.tables import markdown
from loratune.config.schema import CompareConfig, EvaluateConfig, RunConfig


def test_answers_are_scored_by_every_metric_paired_by_prompt_and_seed(
    tiny: Callable[..., RunConfig], rows: Callable[..., str]
) -> None:
    texts = [{"text": f"The river of town number {n} is Mareth."} for n in range(4)]
    wanted = CompareConfig(
        lr_points=1, rungs=1, heldout_path=rows("kept", texts), target_loss=4.2, steps=6
    )
    metrics = EvaluateConfig(
        max_new_tokens=8, generate_limit=8, metrics=["exact_match", "bleu", "rouge_l"]
    )
    config = tiny(compare=wanted, evaluate=metrics)
    options = Options(variants=["lora", "lora_fa"], seeds=2, lr_grid=[1e-2])
    comparison, folder = compare(config, options)
    assert comparison.text_metrics == ["bleu", "rouge_l"]
    for variant in comparison.variants:
        for name in comparison.text_metrics:
            estimate = variant.estimates[name]
            own = [run.text[name] for run in variant.members]
            assert estimate.mean == pytest.approx(statistics.fmean(own))
            assert (estimate.seeds, estimate.units) == (2, 6)
            assert estimate.low is not None and estimate.low <= estimate.mean <= estimate.high
        for run in variant.members:
            assert run.forgetting_at_target is not None and run.steps_to_target is not None
            assert run.forgetting is not None
            losses = [p.heldout_loss - comparison.base.heldout_loss for p in run.curve]
            assert min(losses) <= run.forgetting_at_target <= max(losses)
    first, second = comparison.variants
    for name in comparison.text_metrics:
        [pair] = [one for one in comparison.differences if one.metric == name]
        expected = first.estimates[name].mean - second.estimates[name].mean
        assert pair.difference == pytest.approx(expected, abs=1e-9)
        assert pair.low <= pair.high
    assert "bleu" in comparison.base.text and "BLEU [95 % CI]" in markdown(comparison)
    assert Comparison.from_dict(comparison.to_dict()) == comparison
    assert (folder / "comparison.json").is_file()
