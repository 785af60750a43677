"""A resumed run is the run that never stopped, or it does not start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.conftest import Bench
from faults.harness import differences, in_parallel, result, tree
from faults.tally import TALLY
from faults.verify import check_recovered, check_told, verified_steps
from loratune.adapters.registry import variant_names
from loratune.files import read_sealed_json, write_sealed_json

EVERY_STEP = ("trainer.save_every=1", "trainer.eval_every=4", "trainer.steps=9")
"""Nine steps of 2 × 2 rows of 16: the epoch ends after steps 4 and 8."""


def cut(source: Path, target: Path, step: int) -> Path:
    """The run folder as a kill after `step` would have left it, but with all later log lines."""
    shutil.copytree(source, target)
    for name in ("adapter", "merged"):
        shutil.rmtree(target / name, ignore_errors=True)
    for name in ("summary.json", "evaluation.json"):
        (target / name).unlink(missing_ok=True)
    for checkpoint in (target / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    return target


def resume_everywhere(bench: Bench, variant: str, steps: list[int]) -> None:
    """Resume a run of `variant` at each of these steps and compare every byte."""
    words = (f"adapter={variant}", *EVERY_STEP)
    whole = bench.folder / "whole"
    done = bench.train(whole, *words)
    assert done.code == 0, done.err
    assert verified_steps(whole) == list(range(1, 10))
    expected = result(whole)

    def resume(step: int) -> None:
        run = cut(whole, bench.folder / f"from{step}", step)
        check_recovered(run, bench.train(run, *words, "resume=auto"), expected)
        TALLY.add("resumes compared byte for byte")

    in_parallel(resume, steps)


@pytest.mark.parametrize("variant", variant_names())
def test_a_resumed_run_has_the_bytes_of_an_uninterrupted_one(bench: Bench, variant: str) -> None:
    first = sorted(variant_names()).index(variant) % 4 + 1
    resume_everywhere(bench, variant, [first, first + 4])


@pytest.mark.slow
@pytest.mark.parametrize("variant", variant_names())
def test_a_resumed_run_has_those_bytes_at_every_step(bench: Bench, variant: str) -> None:
    resume_everywhere(bench, variant, list(range(1, 10)))


def test_an_early_stopped_run_stays_stopped_when_resumed(bench: Bench) -> None:
    words = (
        "trainer.eval_every=2",
        "trainer.early_stop_patience=1",
        "trainer.lr=3",
        "trainer.steps=40",
    )
    whole = bench.folder / "whole"
    done = bench.train(whole, *words)
    assert done.code == 0, done.err
    assert "stopped early" in done.out
    last = verified_steps(whole)[-1]
    assert last < 40
    run = cut(whole, bench.folder / "again", last)
    check_recovered(run, bench.train(run, *words, "resume=auto"), result(whole))


# -- damage ------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(bytes(content))


FILES = (
    "adapter.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "state.json",
    "manifest.json",
)
DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "missing": Path.unlink,
    "flipped byte": flip,
    "emptied": lambda path: path.write_bytes(b""),
}


@pytest.fixture(scope="module")
def whole(session_bench: Bench) -> Path:
    """An undisturbed 12-step run with checkpoints 3, 6, 9, 12."""
    run = session_bench.folder / "for-damage"
    done = session_bench.train(run)
    assert done.code == 0, done.err
    return run


def test_a_damaged_newest_checkpoint_is_named_skipped_and_made_again(
    bench: Bench, whole: Path
) -> None:
    expected = result(whole)
    cases = [(file, damage) for file in FILES for damage in DAMAGES]
    cases += [("", "empty folder")]

    def damage_and_resume(case: tuple[str, str]) -> None:
        file, damage = case
        run = cut(whole, bench.folder / f"{file}-{damage}", 9)
        newest = run / "checkpoints" / "step_000009"
        if file:
            DAMAGES[damage](newest / file)
        else:
            shutil.rmtree(newest)
            newest.mkdir()
        TALLY.add("damaged checkpoint files")
        named = bench.train(run, f"resume={newest}", "data.limit=null")
        check_told(named, 6, "damaged checkpoint", file or "manifest.json")
        resumed = bench.train(run, "resume=auto")
        noticed = f"skipped step_000009: {file or 'manifest.json'}" in resumed.out
        TALLY.add("damages not noticed", 0 if noticed else 1)
        assert noticed, resumed.out
        [aside] = (run / "checkpoints").glob("damaged-step_000009-*")
        shutil.rmtree(aside)  # kept for the user, and no part of the result
        check_recovered(run, resumed, expected)

    in_parallel(damage_and_resume, cases)


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_over(
    bench: Bench, whole: Path
) -> None:
    run = cut(whole, bench.folder / "run", 9)
    for checkpoint in (run / "checkpoints").iterdir():
        flip(checkpoint / "optimizer.safetensors")
    before = tree(run)
    check_told(bench.train(run, "resume=auto"), 6, "step_000003", "step_000006", "step_000009")
    after = tree(run)
    del before[".lock"], after[".lock"]
    assert after == before


def test_resuming_a_finished_run_changes_nothing(bench: Bench, whole: Path) -> None:
    run = bench.folder / "run"
    shutil.copytree(whole, run)
    before = tree(run)
    for words in (bench.words(run, "resume=auto"), ["train", f"resume={run}"]):
        again = bench.loratune(*words)
        assert again.code == 0, again.err
        assert "already complete" in again.out
    assert tree(run) == before


def test_a_finished_run_goes_on_when_more_steps_are_allowed(bench: Bench, whole: Path) -> None:
    run = bench.folder / "run"
    shutil.copytree(whole, run)
    more = ("trainer.steps=15", "trainer.schedule=linear")
    refused = bench.loratune("train", f"resume={run}", *more)
    check_told(refused, 6, "trainer.steps: 12 → 15")
    went_on = bench.loratune("train", f"resume={run}", *more, "allow_drift=[trainer.steps]")
    assert went_on.code == 0, went_on.err
    assert verified_steps(run)[-1] == 15
    manifest = json.loads((run / "checkpoints/step_000015/manifest.json").read_text())
    assert manifest["drift"] == ["trainer.steps: 12 → 15"]


def test_a_run_goes_on_from_an_older_checkpoint_without_meeting_the_newer_ones(
    bench: Bench, whole: Path
) -> None:
    run = bench.folder / "run"
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    old = run / "checkpoints" / "step_000006"
    done = bench.loratune("train", f"resume={old}", "trainer.lr=0.02", "allow_drift=[trainer.lr]")
    assert done.code == 0, done.err
    assert verified_steps(run) == [3, 6, 9, 12]
    assert differences(result(run), result(whole)) and old.is_dir()
    aside = sorted(path.name for path in (run / "checkpoints").glob("superseded-*"))
    assert aside == ["superseded-step_000009-0", "superseded-step_000012-0"]
    manifest = json.loads((run / "checkpoints/step_000009/manifest.json").read_text())
    assert manifest["recipe"]["trainer"]["lr"] == 0.02


def test_a_run_can_be_moved_and_so_can_its_data(bench: Bench, whole: Path) -> None:
    run = cut(whole, bench.folder / "elsewhere" / "renamed", 6)
    rows = bench.copy("train.jsonl")
    resumed = bench.loratune("train", f"resume={run}", f"data.path={rows}")
    assert resumed.code == 0, resumed.err
    kept = {n: v for n, v in result(run).items() if not n.endswith("manifest.json")}
    before = {n: v for n, v in result(whole).items() if not n.endswith("manifest.json")}
    assert not differences(kept, before)


def test_other_versions_withdraw_the_promise_and_are_recorded(bench: Bench, whole: Path) -> None:
    run = cut(whole, bench.folder / "run", 6)
    path = run / "checkpoints" / "step_000006" / "manifest.json"
    manifest = read_sealed_json(path)
    now = manifest["versions"]["torch"]
    manifest["versions"]["torch"] = "2.12.0"
    write_sealed_json(path, manifest)
    resumed = bench.train(run, "resume=auto")
    assert resumed.code == 0, resumed.err
    assert f"torch: 2.12.0 → {now}" in resumed.out
    later = json.loads((run / "checkpoints/step_000009/manifest.json").read_text())
    assert later["drift"] == [f"torch: 2.12.0 → {now}"]
