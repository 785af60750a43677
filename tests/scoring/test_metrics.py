"""Metrics of answers against the packages that define them, and their intervals."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

import loratune
from loratune.errors import ConfigError, LoratuneError
from loratune.scoring import registry
from loratune.scoring.metric import MeanMetric, TextMetric
from loratune.scoring.registry import metric_label, require_metrics, text_metrics
from loratune.scoring.resampling import TokenMean, estimated, gained, score_of

WORDS = [
    "the",
    "a",
    "blue",
    "spice",
    "is",
    "near",
    "cheap",
    "coffee",
    "shop",
    "in",
    "city",
    "centre",
    "by",
    "river",
    "it",
    "has",
    "food",
]


def corpus(seed: int, prompts: int = 60) -> tuple[list[str], list[list[str]]]:
    """Answers, and one to three references each, none like another."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(3, 12))).capitalize() + " ."

    references = [[text() for _ in range(draw.randint(1, 3))] for _ in range(prompts)]
    answers = []
    for own in references:
        words = draw.choice(own).split()
        words[draw.randrange(len(words))] = draw.choice(WORDS)
        answers.append(" ".join(words))
    answers[3], answers[5] = "", "Blue"  # nothing, and too little for an n-gram
    return answers, references


def parts_of(metric: TextMetric, answers: list[str], references: list[list[str]]):
    return [metric.parts(a, own) for a, own in zip(answers, references, strict=True)]


def streams(references: list[list[str]]) -> list[list[str | None]]:
    """References as sacrebleu takes them: the nth of every prompt, ``None`` where there is none."""
    most = max(map(len, references))
    return [[own[n] if n < len(own) else None for own in references] for n in range(most)]


@pytest.mark.parametrize(("name", "oracle"), [("bleu", BLEU()), ("chrf", CHRF())])
def test_corpus_metrics_are_sacrebleus_with_any_number_of_references(name, oracle) -> None:
    answers, references = corpus(0)
    [metric] = text_metrics([name])
    ours = score_of(metric, parts_of(metric, answers, references))
    theirs = oracle.corpus_score(answers, streams(references)).score
    assert 0 < theirs < 100 and ours == theirs


def test_rouge_l_is_rouge_scores_mean_over_the_best_references() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    answers, references = corpus(1)
    scorer = RougeScorer(["rougeL"])
    pairs = zip(references, answers, strict=True)
    theirs = statistics.fmean(scorer.score_multi(r, a)["rougeL"].fmeasure for r, a in pairs)
    [metric] = text_metrics(["rouge_l"])
    assert score_of(metric, parts_of(metric, answers, references)) == pytest.approx(
        theirs, abs=1e-15
    )


def test_an_interval_of_bleu_is_the_one_that_sacrebleu_resamples() -> None:
    answers, references = corpus(2, prompts=150)
    [metric] = text_metrics(["bleu"])
    ours = estimated(metric, parts_of(metric, answers, references))
    theirs = BLEU().corpus_score(answers, streams(references), n_bootstrap=1000)
    assert ours.low is not None and ours.high is not None
    assert (ours.high - ours.low) / 2 == pytest.approx(theirs._ci, rel=0.15)
    assert (ours.high + ours.low) / 2 == pytest.approx(theirs._mean, abs=0.3 * theirs._ci)


def test_pairing_by_prompt_takes_out_what_both_find_hard() -> None:
    draw = random.Random(0)
    hard = [draw.random() for _ in range(200)]
    base = [[x] for x in hard]
    adapted = [[x + 0.1 + draw.gauss(0, 0.01)] for x in hard]
    metric = MeanMetric("score", lambda answer, references: 0.0)
    gain, alone = gained(metric, adapted, base), estimated(metric, adapted)
    assert gain.low is not None and gain.high is not None and alone.low is not None
    assert gain.low < gain.difference < gain.high
    assert gain.high - gain.low < 0.1 * (alone.high - alone.low)
    half = 1.96 * statistics.pstdev(a[0] - b[0] for a, b in zip(adapted, base, strict=True))
    assert gain.high - gain.difference == pytest.approx(half / 200**0.5, rel=0.1)
    assert gain.p is not None and gain.p < 0.001


def test_two_models_with_the_same_answers_differ_by_nothing_and_p_is_1() -> None:
    answers, references = corpus(3)
    [metric] = text_metrics(["bleu"])
    parts = parts_of(metric, answers, references)
    gain = gained(metric, parts, parts)
    assert (gain.difference, gain.low, gain.high, gain.p) == (0, 0, 0, 1)


def test_a_loss_is_a_mean_over_tokens_not_over_prompts() -> None:
    parts = [[10.0, 1.0], [10.0, 100.0]]
    assert score_of(TokenMean("loss"), parts) == pytest.approx(20 / 101)
    assert estimated(TokenMean("loss"), parts[:1]).low is None


# -- by name -------------------------------------------------------------------------------


def test_a_metric_of_ones_own_is_registered_by_a_program(monkeypatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    loratune.register_metric("brevity", lambda answer, references: 1 / (1 + len(answer)), "short")
    [metric] = text_metrics(["brevity"])
    assert score_of(metric, [metric.parts("", ["x"]), metric.parts("abc", ["x"])]) == 0.625
    assert metric_label("brevity") == "short"
    with pytest.raises(ConfigError, match="built in"):
        loratune.register_metric("bleu", lambda answer, references: 0.0)


def install(folder: Path, code: str) -> None:
    """An installed distribution that brings the metric ``starts_alike``."""
    (folder / "my_metrics.py").write_text(code)
    info = folder / "my_metrics-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-metrics\nVersion: 1.0\n")
    point = "[loratune.metrics]\nstarts_alike = my_metrics:starts_alike\n"
    (info / "entry_points.txt").write_text(point)


def test_an_installed_package_brings_a_metric(tmp_path: Path, monkeypatch) -> None:
    code = "def starts_alike(answer, references):\n    return answer[:1] == references[0][:1]\n"
    install(tmp_path, code)
    with pytest.raises(ConfigError, match="no metric 'starts_alike'"):
        require_metrics(["starts_alike"])
    monkeypatch.syspath_prepend(tmp_path)
    [metric] = text_metrics(["starts_alike"])
    assert [metric.parts("ab", ["ac"]), metric.parts("b", ["a"])] == [[1.0], [0.0]]


def test_a_metric_that_cannot_be_loaded_is_a_line(tmp_path: Path, monkeypatch) -> None:
    install(tmp_path, "import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_metrics", raising=False)
    with pytest.raises(ConfigError, match="cannot be loaded: ModuleNotFoundError"):
        text_metrics(["starts_alike"])


def test_all_that_is_wrong_with_names_is_said_at_once(monkeypatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(LoratuneError) as problem:
        require_metrics(["exact_match", "bluee", "bleu", "rouge_l"])
    assert problem.value.exit_code == 2
    said = "\n".join(problem.value.lines())
    assert "no metric 'bluee'" in said and "did you mean 'bleu'?" in said
    assert "'bleu' needs the package sacrebleu" in said and "needs the package rouge-score" in said
    assert said.count("pip install 'loratune[metrics]'") == 2
