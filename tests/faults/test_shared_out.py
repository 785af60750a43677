"""Trained weights that several processes share out: clipped, continued, resumed, corrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import Outcome
from torch import Tensor

from faults.conftest import Bench
from faults.harness import result
from faults.test_processes import Rank, start_unlike
from faults.test_resume import cut
from faults.verify import check_recovered, check_told, verified_steps

SHARD = "launch.shard=true"
CLIP = 0.5
FULL = (
    "adapter=full", "adapter.every_parameter=true", "adapter.dropout=0", "trainer.batch_size=4",
    "trainer.lr=1e-3", "trainer.eps=1e-3",
)  # fmt: skip
"""AdamW divides by √v + eps: with this eps a gradient's rounding moves a weight by about
lr · rounding / eps, not by up to lr, as where the gradient is nothing but rounding."""


def run_all(bench: Bench, out: str | Path, ranks: int | list[Rank], *words: str) -> list[Outcome]:
    """All processes of a run, which must succeed."""
    each = [Rank()] * ranks if isinstance(ranks, int) else ranks
    outcomes = [case.wait() for case in start_unlike(bench, out, each, *words)]
    assert {outcome.code for outcome in outcomes} == {0}, outcomes[0].err
    return outcomes


def logged(run: Path, key: str) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All numbers of all tensors, in double precision."""
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def first_moments(run: Path, step: int) -> Tensor:
    state = load_file(run / f"checkpoints/step_{step:06d}/optimizer.safetensors")
    return flat({name: value for name, value in state.items() if name.endswith("|exp_avg")})


def test_whole_and_shared_out_gradients_are_clipped_together_and_once(bench: Bench) -> None:
    """A correction, whole on every process, beside an output head that they share out.

    After one step AdamW's first moment is 0.1 · gradient, and the gradient's norm the bound: to
    1e-6 / norm, which torch adds to the norm that it divides by, and fp32's rounding.
    """
    words = ["targets.modules_to_save=[lm_head]", "adapter.dropout=0", "trainer.steps=2"]
    words += ["trainer.save_every=1", f"trainer.clip_norm={CLIP}"]
    one, two = bench.folder / "one", bench.folder / "two"
    assert bench.train(one, *words).code == 0
    run_all(bench, two, 2, *words, SHARD)
    norms = logged(two, "train/grad_norm")
    assert norms[0] > 2 * CLIP
    assert norms == pytest.approx(logged(one, "train/grad_norm"), rel=1e-5)
    assert logged(two, "train/loss") == pytest.approx(logged(one, "train/loss"), rel=1e-5)
    moment = first_moments(two, 1)
    assert float(moment.norm()) == pytest.approx(0.1 * CLIP, rel=1e-5)
    assert float((moment - first_moments(one, 1)).norm()) < 1e-5 * 0.1 * CLIP


class Continuing(Bench):
    """The targets are those of the adapter that is continued."""

    def words(self, out: str | Path, *more: str) -> list[str]:
        return [word for word in super().words(out, *more) if not word.startswith("targets=")]


@pytest.mark.parametrize("count", [2, 3])
def test_an_adapter_is_continued_in_rows_as_it_is_whole(bench: Bench, count: int) -> None:
    """Every process reads its own rows of the file.  Two numbers have one sum, three have several:
    then the steps, of 1e-3 each, agree to what their rounding comes to."""
    words = [*FULL, "trainer.steps=3", "trainer.clip_norm=0", "trainer.grad_accum_steps=1"]
    run_all(bench, "before", 2, *words)
    words.append(f"adapter_path={bench.folder / 'before/adapter'}")
    bench = Continuing(bench.folder, bench.shared, bench.cli)
    run_all(bench, "whole", count, *words)
    run_all(bench, "shared", count, *words, SHARD)
    before, whole, shared = (
        flat(load_file(bench.folder / run / "adapter/adapter_model.safetensors"))
        for run in ("before", "whole", "shared")
    )
    assert float((whole - before).abs().max()) > 1e-3
    largest = float((shared - whole).abs().max())
    assert largest < 1e-5 if count > 2 else largest == 0


def test_processes_that_continue_different_adapters_are_told(bench: Bench) -> None:
    """Each reads its own rows: the start would be made of two adapters, and none would see it."""
    words = [*FULL, "trainer.steps=3"]
    for name, seed in (("a", 1), ("b", 2)):
        assert bench.train(name, *words, f"trainer.seed={seed}").code == 0
    paths = [f"adapter_path={bench.folder / name / 'adapter'}" for name in "ab"]
    ranks = [Rank((path,)) for path in paths]
    bench = Continuing(bench.folder, bench.shared, bench.cli)
    for case in start_unlike(bench, bench.folder / "run", ranks, *words, SHARD):
        check_told(case.wait(), 2, "rank 1 differs from rank 0", "adapter:", "→")
    assert not (bench.folder / "run").exists()


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2)])
def test_another_number_of_processes_takes_its_own_rows_of_what_was_saved(
    bench: Bench, before: int, after: int
) -> None:
    """Of 16, 24 and 300 rows, three processes have 6, 6 and 4; 8 each; 100 each."""
    run_all(bench, "whole", before, *FULL, SHARD)
    run = cut(bench.folder / "whole", bench.folder / "run", 6)
    run_all(bench, run, after, *FULL, SHARD, "resume=auto", "allow_drift=[processes]")
    whole = bench.folder / "whole"
    for name in ("adapter", "optimizer"):
        file = f"checkpoints/step_000012/{name}.safetensors"
        expected, found = flat(load_file(whole / file)), flat(load_file(run / file))
        assert float((expected - found).abs().max()) < 1e-5, name
    for key in ("train/loss", "train/grad_norm"):
        assert logged(run, key) == pytest.approx(logged(whole, key), rel=1e-5)
    assert logged(run, "train/tokens") == logged(whole, "train/tokens")


def test_rows_that_memory_lost_after_they_were_saved_are_not_published(bench: Bench) -> None:
    """No other process has them; the checkpoint does, and the next start publishes what it has."""
    words = [*FULL, "trainer.steps=6"]
    run_all(bench, "whole", 2, *words, SHARD)
    run, fault = bench.folder / "run", "nudge@loratune.pipeline.records.adapter_state:1"
    for case in start_unlike(bench, run, [Rank(), Rank(faults=(fault,))], *words, SHARD):
        check_told(case.wait(), 5, "tensors are not as rank 1 saved them", "step_000006")
    assert not (run / "adapter").exists()
    first, _ = run_all(bench, run, 2, *words, SHARD, "resume=auto")
    check_recovered(run, first, result(bench.folder / "whole"))


def test_a_gradient_that_one_process_broke_is_told_by_all_and_nothing_is_applied(
    bench: Bench,
) -> None:
    """What is not finite lies in the rows of some processes only: all must hear of it."""
    run, fault = bench.folder / "run", "nangrad@loratune.training.step.batch_loss:9"
    for case in start_unlike(bench, run, [Rank(), Rank(faults=(fault,)), Rank()], *FULL, SHARD):
        check_told(case.wait(), 5, "gradient", "not finite", "step 5")
    assert verified_steps(run) == [3]


def test_the_best_step_is_published_and_measured_beside_the_base(bench: Bench) -> None:
    """Too high a rate: the last step is not the best, whose rows every process reads again."""
    words = [*FULL, "trainer.lr=0.3", "trainer.eval_every=3", "stages=[train,evaluate]"]
    words = [word for word in words if word != "trainer.lr=1e-3"]
    run_all(bench, "two", 2, *words, SHARD)
    run = bench.folder / "two"
    best = json.loads((run / "summary.json").read_text())["training"]["best_step"]
    assert 0 < best < 12
    published = load_file(run / "adapter/adapter_model.safetensors")
    saved = load_file(run / f"checkpoints/step_{best:06d}/adapter.safetensors")
    published = {name.removeprefix("base_model.model."): one for name, one in published.items()}
    saved = {name.replace("trained_module.", ""): one for name, one in saved.items()}
    assert published.keys() == saved.keys()
    assert all(torch.equal(one, saved[name]) for name, one in published.items())
    again = bench.loratune("evaluate", f"run={run}", f"out={bench.folder / 'again.json'}")
    assert again.code == 0, again.err
    scores, expected = (
        json.loads(path.read_text())
        for path in (run / "evaluation.json", bench.folder / "again.json")
    )
    for model in ("base", "adapted"):
        assert scores[model]["loss"] == pytest.approx(expected[model]["loss"], rel=1e-5)
