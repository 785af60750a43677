"""What a training says of itself, and the advice that each injected cause brings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import VOCABULARY, tiny_opt
from support.variants import ranked
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import loratune
from loratune.adapters.registry import variant_names
from loratune.config.convert import to_plain
from loratune.config.schema import Schedule, TrainerConfig
from loratune.data.arrangement import Arrangement
from loratune.data.batches import BatchPlan
from loratune.data.collate import collate
from loratune.data.encoded_rows import EncodedRow
from loratune.data.training_set import TrainingSet
from loratune.loss.causal_model import LanguageModelHead
from loratune.runs.run_dir import RunDir
from loratune.stages.train import train
from loratune.training.advice import Advice, Setup, advise, summary_lines
from loratune.training.display import HealthLine
from loratune.training.health import HealthMonitor
from loratune.training.history import History
from loratune.training.optim import make_optimizer
from loratune.training.step import train_step

DEAD = "model.decoder.layers.1.fc1"


def rows(count: int = 8) -> list[EncodedRow]:
    """Rows of unlike length, each with a prompt that is not supervised and an answer that is."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        length = 5 + number % 3
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        made.append(EncodedRow(ids, ((2, length),), 2, f"rows.jsonl:{number + 1}"))
    return made


def wrapped_model(variant: str = "lora", **settings: Any) -> Any:
    if variant == "vera":
        settings = {"rank": 16, **settings}
    return loratune.wrap(
        tiny_opt(), variant, targets="all-linear", **{**ranked(variant, 4), **settings}
    )


def one_step(wrapped: Any, number: int, rate: float = 1e-2) -> None:
    optimizer = make_optimizer(wrapped.model, wrapped.config, TrainerConfig(lr=rate))
    head = LanguageModelHead(wrapped.model)
    train_step(head, [collate(rows(), 1, range(8))], optimizer, 1.0, number)


# -- what is measured ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", variant_names())
def test_norms_are_those_of_the_tensors(variant: str) -> None:
    wrapped = wrapped_model(variant)
    trained = {n: p for n, p in wrapped.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    whole = [t.clone() for a in wrapped.adapters.values() for t in a.adapter_tensors().values()]
    monitor = HealthMonitor(wrapped, 100)
    monitor.before_step()
    one_step(wrapped, 0)
    measured = monitor.after_step()
    moved = torch.cat([(p.detach() - before[name]).flatten() for name, p in trained.items()]).norm()
    size = torch.cat([tensor.detach().flatten() for tensor in whole]).norm()
    assert moved > 0
    assert measured["health/update_norm"] == pytest.approx(float(moved), rel=1e-5)
    assert measured["health/update_ratio"] == pytest.approx(
        float(moved / size) if size else 0.0, rel=1e-5
    )
    assert measured["health/dead_modules"] == 0
    for kind in {name.removesuffix(".weight") for a in wrapped.adapters.values()
                 for name in a.adapter_tensors()}:  # fmt: skip
        tensors = [
            tensor.detach().flatten()
            for a in wrapped.adapters.values()
            for name, tensor in a.adapter_tensors().items()
            if name.removesuffix(".weight") == kind
        ]
        norm = float(torch.cat(tensors).norm())
        assert measured[f"health/norm/{kind}"] == pytest.approx(norm, rel=1e-5)


def test_the_ratio_of_b_to_a_is_given_where_there_are_both() -> None:
    for variant, expected in (("lora", True), ("lora_fa", True), ("vera", False)):
        wrapped = wrapped_model(variant)
        monitor = HealthMonitor(wrapped, 100)
        monitor.before_step()
        one_step(wrapped, 0)
        measured = monitor.after_step()
        assert ("health/norm_ratio" in measured) is expected
        if expected:
            b, a = measured["health/norm/lora_B"], measured["health/norm/lora_A"]
            assert measured["health/norm_ratio"] == pytest.approx(b / a)


def test_a_module_whose_output_is_thrown_away_is_called_dead() -> None:
    wrapped = wrapped_model()
    throw_away(wrapped)
    monitor = HealthMonitor(wrapped, 100)
    monitor.before_step()
    one_step(wrapped, 0)
    assert monitor.after_step()["health/dead_modules"] == 1
    assert monitor.dead == [DEAD]


def throw_away(wrapped: Any, after: int = 0) -> None:
    """After ``after`` forward passes, a module's output no longer depends on its adapter."""
    calls = [0]

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return output.detach() if calls[0] > after else output

    wrapped.model.get_submodule(DEAD).register_forward_hook(hook)


def test_measuring_changes_nothing() -> None:
    with_, without = wrapped_model(), wrapped_model()
    monitor = HealthMonitor(with_, 50)
    for number in range(3):
        monitor.before_step()
        one_step(with_, number)
        monitor.after_step()
        one_step(without, number)
    for name, tensor in with_.model.state_dict().items():
        assert torch.equal(tensor, without.model.state_dict()[name])


def test_a_training_is_measured_at_its_first_and_at_most_every_tenth_step() -> None:
    short, long = (HealthMonitor(wrapped_model(), total) for total in (50, 100_000))
    assert [n for n in range(1, 51) if short.due(n)] == [1, 10, 20, 30, 40, 50]
    assert sum(long.due(n) for n in range(1, 100_001)) == 1 + 30


def numbers_touched(work: Callable[[], Any]) -> int:
    """How many numbers go into and come out of the operations of some work."""

    class Counter(TorchDispatchMode):
        touched = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            Counter.touched += sum(tensor.numel() for tensor in tensors)
            return result

    with Counter():
        work()
    return Counter.touched


def test_measuring_costs_less_than_a_hundredth_of_the_steps() -> None:
    wrapped = wrapped_model()
    monitor = HealthMonitor(wrapped, 100)

    def measure() -> None:
        monitor.before_step()
        monitor.after_step()

    # The numbers that operations touch, not seconds: of a real model's step, whose base is far
    # larger beside its adapters than here, measuring is a far smaller share.
    step = numbers_touched(lambda: one_step(wrapped, 0))
    assert 0 < numbers_touched(measure) / monitor.every < 0.01 * step


# -- real trainings, with the cause injected -------------------------------------------------


def recorded(
    folder: Path, wrapped: Any, evaluate: Any = None, count: int = 24, **settings: Any
) -> History:
    """Train for real on rows made here, and read what was recorded."""
    config = TrainerConfig(**{"steps": 40, "batch_size": 8, **settings})
    made = rows(count)
    plan = BatchPlan([len(row) for row in made], batch_size=8, steps=config.steps)
    folder.mkdir(parents=True, exist_ok=True)
    run_dir = RunDir(folder)
    head = LanguageModelHead(wrapped.model)
    train(
        wrapped, head, TrainingSet(made, plan, Arrangement(1)), config, run_dir,
        facts={}, evaluate=evaluate,
    )  # fmt: skip
    return History.read(run_dir.metrics, run_dir.timings)


def kinds(history: History, **setup: Any) -> set[str]:
    return {advice.kind for advice in advise(history, Setup(**setup))}


def test_a_healthy_training_brings_no_advice(tmp_path: Path) -> None:
    history = recorded(tmp_path / "run", wrapped_model(), lr=1e-2)
    assert history.values("train/loss")[-1] < 0.97 * history.values("train/loss")[0]
    assert kinds(history) == set()


def test_a_tiny_learning_rate_is_called_too_low(tmp_path: Path) -> None:
    assert kinds(recorded(tmp_path / "run", wrapped_model(), lr=1e-7)) == {"rate_too_low"}


def test_a_huge_learning_rate_is_called_too_high(tmp_path: Path) -> None:
    settings = {"lr": 3.0, "clip_norm": 0.0, "schedule": Schedule.constant}
    assert "rate_too_high" in kinds(recorded(tmp_path / "run", wrapped_model(), **settings))


def test_a_huge_ratio_is_blamed_on_the_ratio(tmp_path: Path) -> None:
    wrapped = wrapped_model("lora_plus", lr_ratio=400.0)
    settings = {"lr": 1e-2, "clip_norm": 0.0, "schedule": Schedule.constant}
    history = recorded(tmp_path / "run", wrapped, **settings)
    found = advise(history, Setup.of({"adapter": to_plain(wrapped.config)}))
    assert [advice.kind for advice in found if "too" in advice.kind] == ["ratio_too_high"]
    assert "400 times" in found[0].text
    assert "lower adapter.lr_ratio" in found[0].text


def test_a_module_that_dies_on_the_way_is_named(tmp_path: Path) -> None:
    wrapped = wrapped_model()
    throw_away(wrapped, after=5)
    history = recorded(tmp_path / "run", wrapped, lr=1e-2)
    (advice,) = [one for one in advise(history, Setup()) if one.kind == "dead_modules"]
    assert DEAD in advice.text
    assert "targets.exclude" in advice.text


def test_rising_evaluation_loss_is_told_with_the_step_to_keep(tmp_path: Path) -> None:
    asked = rows()[1]
    other = [3 + (token + 7) % 290 for token in asked.input_ids[2:]]
    held_out = EncodedRow([*asked.input_ids[:2], *other], asked.spans, 2, "eval")
    wrapped = wrapped_model(rank=16)
    head = LanguageModelHead(wrapped.model)

    def evaluate() -> dict[str, float]:
        from loratune.stages.evaluate import evaluation_loss

        with torch.inference_mode():
            return {"eval/loss": evaluation_loss(head, [held_out], Arrangement(1), 1)[0]}

    # The question of a training row with another answer: learning the one unlearns the other.
    settings = {"lr": 2e-2, "steps": 50, "eval_every": 10}
    history = recorded(tmp_path / "run", wrapped, evaluate, count=2, **settings)
    found = advise(history, Setup())
    (rising,) = [one for one in found if one.kind == "eval_rising"]
    best = min(history.pairs("eval/loss"), key=lambda pair: pair[1])[0]
    assert f"The adapter of step {best} is the one kept" in rising.text
    assert "while training loss fell: the adapter memorises" in rising.text


def test_rows_of_very_unlike_length_are_called_wasteful(tmp_path: Path) -> None:
    made = [EncodedRow([5] * (60 if n == 0 else 6), ((2, 5),), 2, str(n)) for n in range(8)]
    plan = BatchPlan([len(row) for row in made], batch_size=8, steps=6)
    wrapped = wrapped_model()
    run_dir = RunDir(tmp_path)
    config = TrainerConfig(steps=6, batch_size=8, lr=1e-2)
    train(
        wrapped, LanguageModelHead(wrapped.model), TrainingSet(made, plan, Arrangement(1)), config,
        run_dir, facts={},
    )  # fmt: skip
    history = History.read(run_dir.metrics, run_dir.timings)
    (advice,) = advise(history, Setup(group_by_length=False))
    assert advice.kind == "low_fill"
    assert "79% of the computed tokens were padding" in advice.text  # 102 of 480 are rows
    assert "data.group_by_length=true" in advice.text
    assert "data.packing=true" in advise(history, Setup())[0].text


def test_a_clip_below_every_gradient_is_told(tmp_path: Path) -> None:
    history = recorded(tmp_path / "run", wrapped_model(), lr=1e-2, clip_norm=1e-3)
    assert "often_clipped" in kinds(history, clip_norm=1e-3)


def test_what_is_recorded_of_health_is_the_same_every_time(tmp_path: Path) -> None:
    one = recorded(tmp_path / "a", wrapped_model(), lr=1e-2).metrics
    other = recorded(tmp_path / "b", wrapped_model(), lr=1e-2).metrics
    assert one == other
    assert [row["step"] for row in one if "health/update_norm" in row] == [1, 10, 20, 30, 40]


# -- rules on planted records ----------------------------------------------------------------


def planted(losses: list[float], evals: dict[int, float] | None = None) -> History:
    metrics: list[dict[str, Any]] = []
    for step, loss in enumerate(losses, 1):
        metrics.append({"step": step, "train/loss": loss, "train/lr": 1.0})
        if evals and step in evals:
            metrics.append({"step": step, "eval/loss": evals[step]})
    return History(metrics, [])


def test_one_jump_is_luck_and_two_are_a_rate() -> None:
    smooth = [2.0 * 0.97**n for n in range(60)]
    once = [*smooth[:30], 9.0, *smooth[31:]]
    twice = [*once[:45], 9.0, *once[46:]]
    assert kinds(planted(smooth)) == kinds(planted(once)) == set()
    assert kinds(planted(twice)) == {"rate_too_high"}
    for ratio, kind in ((16.0, "ratio_too_high"), (1.0, "rate_too_high")):
        setup = Setup.of({"adapter": {"variant": "lora_plus", "lr_ratio": ratio}})
        assert {advice.kind for advice in advise(planted(twice), setup)} == {kind}


def test_noise_around_a_tiny_loss_is_no_jump() -> None:
    small = [2.0 * 0.8**n for n in range(30)] + [0.001, 0.009] * 30
    assert kinds(planted(small)) == set()


def test_a_training_that_still_improves_is_told_to_go_on() -> None:
    falling = [2.0 * 0.98**n for n in range(60)]
    assert kinds(planted(falling, {20: 1.6, 40: 1.1, 60: 0.8})) == {"still_falling"}
    assert kinds(planted(falling, {20: 1.6, 40: 0.81, 60: 0.8})) == set()


def test_one_worse_evaluation_is_no_rise() -> None:
    falling = [2.0 * 0.98**n for n in range(80)]
    assert kinds(planted(falling, {20: 1.0, 40: 0.8, 60: 0.9})) == set()
    assert kinds(planted(falling, {20: 1.0, 40: 0.8, 60: 0.9, 80: 0.95})) == {"eval_rising"}
    assert kinds(planted(falling, {20: 1.0, 40: 0.8, 60: 0.805, 80: 0.81})) == set()


def test_few_steps_bring_no_verdict_on_rates() -> None:
    assert kinds(planted([2.0] * 10)) == set()


def test_settings_that_advice_depends_on_are_read_from_a_recipe() -> None:
    recipe = {
        "adapter": {"variant": "lora_plus", "lr_ratio": 16},
        "trainer": {"clip_norm": 0.5},
        "data": {"packing": True},
    }
    setup = Setup.of(recipe)
    assert setup == Setup(on_jumps=setup.on_jumps, clip_norm=0.5, packing=True)
    assert "B learns 16 times as fast as A" in setup.on_jumps
    assert Setup.of({"adapter": {"variant": "of another version"}}) == Setup()
    assert Setup.of({}) == Setup()


def test_the_summary_has_one_line_and_one_more_for_each_advice() -> None:
    lines = summary_lines(planted([2.0] * 30, {10: 1.0, 20: 0.9, 30: 0.89}), Setup())
    assert lines[0] == "health: loss 2 → 2, best evaluation loss 0.89 at step 30"
    assert len(lines) == 2
    assert lines[1].startswith("advice: Training loss hardly moved")
    assert summary_lines(History(), Setup()) == []


def test_half_written_and_foreign_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({"step": 1, "train/loss": 2.0, "odd": "text"})
    path.write_text(f'{good}\n[1]\n{{"no": "step"}}\n{{"step": 2, "train/lo', encoding="utf-8")
    history = History.read(path, tmp_path / "absent.jsonl")
    assert history.pairs("train/loss") == [(1, 2.0)]
    assert history.values("odd") == []


def test_advice_is_plain_text() -> None:
    assert Advice("kind", "text").text == "text"


# -- the line --------------------------------------------------------------------------------


def health_line(steps: int = 50) -> HealthLine:
    line = HealthLine()
    for step in range(1, steps + 1):
        metrics = {"train/loss": 2.0 * 0.98**step, "train/lr": 1e-3, "train/grad_norm": 0.5}
        if step % 10 == 0:
            metrics |= {"health/norm_ratio": 0.25, "health/update_ratio": 0.01}
        line.step(metrics, 0.97, 1234.0, 65.0)
    line.evaluation(20, 1.25)
    line.evaluation(40, 1.5)
    return line


def test_the_line_says_what_matters() -> None:
    text = health_line().text(200)
    assert text == (
        f"loss {2.0 * 0.98**50:.4f} ↓33%  best 1.2500@20  lr 0.001  |g| 0.5  |Δ|/|θ| 0.01  "
        "|B|/|A| 0.25  97% filled  1,234 tokens/s  1:05 left"
    )


@pytest.mark.parametrize("width", range(10, 140, 3))
def test_the_line_fits_and_keeps_the_loss(width: int) -> None:
    text = health_line().text(width)
    assert text.startswith("loss 0.72")
    assert len(text) <= max(width, len("loss 0.7283 ↓33%"))


def test_dead_modules_stand_in_the_line_as_long_as_there_are_any() -> None:
    line = health_line()
    assert "dead" not in line.text(200)
    line.step({"train/loss": 1.0, "train/lr": 1e-3, "health/dead_modules": 2.0}, 1.0, 1.0, 1.0)
    assert "dead modules 2" in line.text(60)


def test_the_trend_is_of_many_steps_not_of_one() -> None:
    line = HealthLine()
    for step in range(40):
        line.step({"train/loss": 1.0 + 0.3 * (step % 2), "train/lr": 1.0}, 1.0, 1.0, 1.0)
    assert "loss 1.3000 →" in line.text(200)
