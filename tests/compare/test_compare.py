"""Whole comparisons of the embedded model: complete, resumable, shared, honest about failures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compare.conftest import tiny_config
from loratune.compare.prepare import prepare
from loratune.compare.result import Comparison
from loratune.compare.run import compare, require_a_result
from loratune.compare.settings import Options, parse_part
from loratune.compare.work import do_all
from loratune.compare.workbench import Workbench
from loratune.config.schema import CompareConfig, RunConfig, TargetsConfig
from loratune.errors import CheckpointError, ConfigError, ModelError, TrainingError
from loratune.report.build import write_comparison_report

Make = Callable[..., RunConfig]
TWO = Options(variants=["lora", "lora_fa"], seeds=2, lr_grid=[2e-3, 4e-3])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    """One comparison, done once."""
    folder = tmp_path_factory.mktemp("template") / "out"
    return compare(tiny_config(folder), TWO)


@pytest.fixture
def finished(template: tuple[Comparison, Path], tmp_path: Path) -> tuple[Comparison, RunConfig]:
    """A finished comparison in a folder of its own, and its recipe."""
    shutil.copytree(template[1], tmp_path / "out")
    return template[0], tiny_config(tmp_path / "out")


def numbers(comparison: Comparison) -> list[Any]:
    """Everything of a comparison that does not depend on the clock."""
    return [
        (v.label, v.lr, [t.loss for t in v.search], [(m.seed, m.order, m.loss) for m in v.members])
        for v in comparison.variants
    ] + [(d.metric, d.difference, d.p_holm) for d in comparison.differences]


def files_below(path: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in path.glob("*/**/*.json") if p.is_file()}


def test_a_comparison_says_everything_it_promises(
    tiny: Make, rows: Callable[[str, list[dict[str, Any]]], str]
) -> None:
    texts = rows("heldout", [{"text": f"Sarfar has {n} mills."} for n in range(3)])
    config = tiny(compare=CompareConfig(rungs=1, heldout_path=texts))
    found, folder = compare(config, TWO)
    assert [v.label for v in found.variants] == ["lora", "lora_fa"]
    assert found.seeds == [0, 1]
    for variant in found.variants:
        assert variant.lr in {trial.lr for trial in variant.search}
        assert [member.seed for member in variant.members] == [0, 1]
        assert variant.estimates.keys() == {
            "loss", "exact_match", "token_accuracy", "forgetting", "step_seconds", "peak_bytes",
            "steps_to_target", "seconds_to_target", "merge_residual",
        }  # fmt: skip
    orders = [[member.order for member in variant.members] for variant in found.variants]
    assert orders[0] == orders[1]
    assert {d.metric for d in found.differences} == {
        "loss", "exact_match", "token_accuracy", "forgetting",
    }  # fmt: skip
    assert all(len(sample.answers) == 2 for sample in found.samples)
    written = json.loads((folder / "comparison.json").read_text())
    assert Comparison.from_dict(written) == found
    assert (folder / "comparison.md").read_text().startswith("# Comparison tiny")
    assert "lora_fa" in write_comparison_report(folder).read_text()


def test_the_rate_chosen_has_the_lowest_dev_loss_of_the_last_rung(tiny: Make) -> None:
    found, _ = compare(tiny(compare=CompareConfig(rungs=2)), replace(TWO, seeds=1))
    for variant in found.variants:
        last = [trial for trial in variant.search if trial.steps == 5 and trial.loss is not None]
        assert variant.lr == min(last, key=lambda trial: trial.loss or 0.0).lr


def test_giving_the_same_command_again_does_no_work_twice(
    finished: tuple[Comparison, RunConfig],
) -> None:
    first, config = finished
    before = files_below(Path(str(config.out)))
    second, folder = compare(config, TWO)
    assert files_below(folder) == before
    assert numbers(first) == numbers(second)


def test_more_seeds_are_added_to_those_there_are(finished: tuple[Comparison, RunConfig]) -> None:
    _, config = finished
    before = files_below(Path(str(config.out)))
    more, folder = compare(config, replace(TWO, seeds=3))
    after = files_below(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2
    assert all(len(variant.members) == 3 for variant in more.variants)


def test_other_rows_or_settings_need_another_folder(
    finished: tuple[Comparison, RunConfig],
) -> None:
    _, config = finished
    with pytest.raises(CheckpointError, match="another comparison: recipe"):
        compare(replace(config, targets=TargetsConfig(modules=["k_proj"])), TWO)
    with pytest.raises(CheckpointError, match="rows"):
        compare(replace(config, data=replace(config.data, eval_path="builtin:terse_dev")), TWO)


def _kill_when(folder: Path, tasks: int, task: Callable[[], object]) -> None:
    """Run ``task`` in a child and kill it as soon as so many tasks are done."""
    child = os.fork()
    if child == 0:
        try:
            task()
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while len(files_below(folder)) < tasks and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("tasks", [3, 8])
def test_a_killed_comparison_continues_to_the_same_numbers(
    template: tuple[Comparison, Path], tmp_path: Path, tasks: int
) -> None:
    config = tiny_config(tmp_path / "killed")
    _kill_when(tmp_path / "killed", tasks, lambda: compare(config, TWO))
    kept = files_below(tmp_path / "killed")
    assert len(kept) >= tasks
    assert not (tmp_path / "killed" / "comparison.json").exists()
    resumed, folder = compare(config, TWO)
    after = files_below(folder)
    assert {name: after[name] for name in kept} == kept
    assert numbers(resumed) == numbers(template[0])
    assert not list(folder.rglob(".tmp-*"))


def test_two_processes_share_the_work_and_agree(
    template: tuple[Comparison, Path], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "shared")
    child = os.fork()
    if child == 0:
        try:
            compare(config, replace(TWO, part=(2, 2)))
        finally:
            os._exit(0)
    shared, folder = compare(config, replace(TWO, part=(1, 2)))
    os.waitpid(child, 0)
    assert numbers(shared) == numbers(template[0])
    assert len(files_below(folder)) == len(files_below(template[1]))


def test_a_failed_seed_run_is_kept_with_its_reason_and_the_others_count(tiny: Make) -> None:
    config = tiny()
    _, plan = prepare(config, TWO)
    bench = Workbench(config)
    train, calls = bench.seed_run, []

    def fails_once(settings: Any, seed: int) -> Any:
        calls.append(seed)
        if settings.adapter.variant == "lora" and seed == 1:
            raise TrainingError("training diverged: the loss is nan", where="step 3")
        return train(settings, seed)

    bench.seed_run = fails_once  # type: ignore[method-assign]
    do_all(bench, plan)
    found, _ = compare(config, TWO)
    lora, frozen = found.variants
    assert lora.members[1].reason == "training diverged: the loss is nan; step 3"
    assert lora.members[1].loss is None
    assert not lora.reason
    assert lora.estimates["loss"].seeds == 1
    assert frozen.estimates["loss"].seeds == 2
    assert any("lora, seed 1 failed: training diverged" in line for line in found.findings)
    again, _ = compare(config, replace(TWO, retry=True))
    assert not again.variants[0].members[1].reason
    assert again.variants[0].estimates["loss"].seeds == 2


def test_a_task_whose_process_died_twice_is_given_up(tiny: Make) -> None:
    config = tiny()
    bench, plan = prepare(config, TWO)
    store = plan.store
    [task, *_] = [task for task in plan.open_tasks() if task.cached.kind == "trials"]
    for _ in range(2):
        child = os.fork()
        if child == 0:
            with store.claim(task.cached):
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
    do_all(bench, plan)
    result = store.read(task.cached)
    assert result is not None
    assert "its process died 2 times" in result["failed"]


def test_a_variant_that_cannot_adapt_the_layers_is_named_before_any_training(
    tiny: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(targets=TargetsConfig(modules=["embed_tokens"]))
    with pytest.raises(ModelError, match="LoRA-FA cannot adapt an embedding"):
        compare(config, TWO)
    prepare(config, replace(TWO, variants=None))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("note: lora_fa is left out: LoRA-FA cannot") for line in lines)


def test_nothing_but_failures_is_an_error_of_training(tiny: Make) -> None:
    found, folder = compare(tiny(), replace(TWO, lr_grid=[1e30]))
    with pytest.raises(TrainingError, match="every training failed") as refused:
        require_a_result(found, folder)
    assert refused.value.exit_code == 5
    assert len(refused.value.lines()) == 1


def test_a_grid_without_a_usable_rate_is_refused_before_the_model_is_read(tiny: Make) -> None:
    config = tiny(model=replace(tiny().model, path="/nowhere"))
    with pytest.raises(ConfigError, match="rate"):
        compare(config, replace(TWO, lr_grid=[]))
    with pytest.raises(ConfigError, match="unknown match"):
        compare(config, replace(TWO, match="size"))


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_an_impossible_part_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_part(text)


def test_a_budget_sets_the_ranks_that_are_trained(tiny: Make) -> None:
    _, plan = prepare(tiny(), replace(TWO, match="trainable"))
    ranks = {s.setting.label: s.setting.config.rank for s in plan.searches}
    assert ranks == {"lora": 4, "lora_fa": 8}


def test_a_plan_counts_the_tasks_that_are_done_in_the_end(
    finished: tuple[Comparison, RunConfig],
) -> None:
    _, plan = prepare(finished[1], TWO)
    assert plan.open_tasks() == []
    assert len(plan.store.finished()) == plan.count()


CONTENDERS = {
    "narrow": {"adapter": "lora", "adapter.rank": 2},
    "feedforward": {"targets": "mlp"},
    "large": {"trainer.batch_size": 8, "trainer.steps": 3},
    "hot": {"trainer.lr": 1e30, "compare.lr_points": 1},
    "huge": {"adapter.rank": 1 << 40, "compare.lr_points": 1},
}
"""One that diverges, and one that no machine has the memory for, among them."""
LABELLED = CompareConfig(contenders=CONTENDERS, lr_points=2, rungs=1)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A comparison of contenders, done once without a stop."""
    folder = tmp_path_factory.mktemp("labelled") / "out"
    return compare(tiny_config(folder, compare=LABELLED), Options(seeds=2))[0]


def test_contenders_are_trained_as_they_say(labelled: Comparison) -> None:
    by_label = {one.label: one for one in labelled.variants}
    assert list(by_label) == list(CONTENDERS)
    narrow, other, large = (by_label[name] for name in ("narrow", "feedforward", "large"))
    assert (narrow.costs.rank, narrow.overrides) == (2, CONTENDERS["narrow"])
    # 4 blocks: q and v of 128 x 128 at rank 2; up and down of 128 x 512 at rank 4.
    assert narrow.costs.trainable == 4 * 2 * 2 * 256
    assert other.costs.trainable == 4 * 2 * 4 * 640
    assert (narrow.steps, large.steps) == (None, 3)
    assert large.members[0].curve[-1].step == 3
    assert narrow.members[0].order != large.members[0].order


def test_a_contender_that_fails_is_named_and_the_rest_goes_on(labelled: Comparison) -> None:
    by_label = {one.label: one for one in labelled.variants}
    assert "diverged" in by_label["hot"].reason
    assert "out of memory" in by_label["huge"].reason
    for label in ("narrow", "feedforward", "large"):
        assert by_label[label].estimates["loss"].seeds == 2
    for label in ("hot", "huge"):
        assert any(line.startswith(f"{label} failed and is left out") for line in labelled.findings)


def test_pairs_keep_the_values_of_every_seed(labelled: Comparison) -> None:
    by_label = {one.label: one for one in labelled.variants}
    losses = [d for d in labelled.differences if d.metric == "loss"]
    assert len(losses) == 3
    for one in losses:
        first, second = by_label[one.first].members, by_label[one.second].members
        assert one.seeds == [0, 1]
        assert one.by_seed == pytest.approx(
            [(a.loss or 0.0) - (b.loss or 0.0) for a, b in zip(first, second, strict=True)]
        )
        best = min(v.estimates["loss"].mean for v in labelled.variants if not v.reason)
        assert labelled.base.loss is not None
        assert one.margin == pytest.approx(0.01 * (labelled.base.loss - best))


@pytest.mark.parametrize("tasks", [4, 14])
def test_killed_contenders_continue_to_the_same_numbers(
    labelled: Comparison, tmp_path: Path, tasks: int
) -> None:
    config = tiny_config(tmp_path / "killed", compare=LABELLED)
    options = Options(seeds=2, part=(2, 3))
    _kill_when(tmp_path / "killed", tasks, lambda: compare(config, options))
    assert numbers(compare(config, options)[0]) == numbers(labelled)


def test_a_wide_margin_finds_the_same_trainings_equivalent(
    finished: tuple[Comparison, RunConfig],
) -> None:
    first, config = finished
    assert not any(one.equivalent for one in first.differences)
    wide = replace(config, compare=replace(config.compare, margin=0.999))
    again, _ = compare(wide, TWO)
    assert numbers(first) == numbers(again)
    [pair] = [one for one in again.differences if one.metric == "loss"]
    [narrow] = [one for one in first.differences if one.metric == "loss"]
    assert pair.margin == pytest.approx(99.9 * (narrow.margin or 0.0))
    assert (pair.p_equivalence or 1.0) < (narrow.p_equivalence or 0.0)


def test_a_rate_that_stands_alone_is_trained_without_a_trial(
    tiny: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    found, folder = compare(tiny(), replace(TWO, lr_grid=[1e-2]))
    assert "about 7 tasks" in capsys.readouterr().out  # the base, two costs, two seeds of two
    assert not list(folder.glob("trials/**/*.json"))
    assert [v.lr for v in found.variants] == [1e-2, 1e-2]
    assert all(run.loss for variant in found.variants for run in variant.members)
