"""A disk that refuses is exit 8, and nothing that was saved is lost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from faults.conftest import Bench
from faults.harness import differences, in_parallel, leftovers, result, tree
from faults.tally import TALLY
from faults.verify import check_recovered, check_told, is_usable

SHORT = ("trainer.steps=4", "trainer.save_every=2", "stages=[train,merge]")


@pytest.mark.parametrize("kind", ["enospc", "efbig"])
def test_a_full_disk_at_a_write_stops_with_exit_8_and_loses_nothing(
    bench: Bench, kind: str
) -> None:
    counted = bench.train("whole", *SHORT, faults=["count@os.fsync"])
    assert counted.code == 0, counted.err
    expected = result(bench.folder / "whole")
    first = 2 if kind == "enospc" else 5

    def refuse_and_resume(number: int) -> None:
        run = bench.folder / f"run{number}"
        stopped = bench.train(run, *SHORT, faults=[f"{kind}@os.fsync:{number}"])
        TALLY.add("disk refusals injected")
        check_told(stopped, 8, str(run), "bytes left")
        assert is_usable(run)
        assert not leftovers(run), leftovers(run)
        check_recovered(run, bench.train(run, *SHORT, "resume=auto"), expected)

    in_parallel(refuse_and_resume, range(first, len(counted.calls) + 1, 6))


@pytest.mark.slow
def test_a_full_disk_at_any_write_stops_with_exit_8_and_loses_nothing(bench: Bench) -> None:
    counted = bench.train("whole", *SHORT, faults=["count@write"])
    expected = result(bench.folder / "whole")

    def refuse_and_resume(number: int) -> None:
        if counted.calls[number - 1] in ("os.unlink", "os.rmdir"):
            return  # removing what is old needs no space
        run = bench.folder / f"run{number}"
        stopped = bench.train(run, *SHORT, faults=[f"enospc@write:{number}"])
        TALLY.add("disk refusals injected")
        if stopped.code == 0:  # Hydra makes a folder that is there already: nothing was refused
            assert counted.calls[number - 1] == "os.mkdir"
            assert not differences(result(run), expected)
            return
        check_told(stopped, 8)
        assert is_usable(run) and not leftovers(run)
        check_recovered(run, bench.train(run, *SHORT, "resume=auto"), expected)
        shutil.rmtree(run)

    in_parallel(refuse_and_resume, range(1, len(counted.calls) + 1))


def test_a_limit_on_file_sizes_stops_with_exit_8_and_keeps_what_was_saved(bench: Bench) -> None:
    run = bench.folder / "run"
    counted = bench.train(run, "adapter.rank=16", "trainer.save_every=6", "stages=[train]")
    assert counted.code == 0, counted.err
    tensors = run / "checkpoints/step_000006/optimizer.safetensors"
    limited = bench.folder / "limited"
    stopped = bench.train(
        limited, "adapter.rank=16", "trainer.save_every=6",
        limits={"RLIMIT_FSIZE": tensors.stat().st_size - 1000},
    )  # fmt: skip
    TALLY.add("disk refusals injected")
    check_told(stopped, 8, "limited/checkpoints/step_000006")
    assert not leftovers(limited)
    check_recovered(
        limited,
        bench.train(limited, "adapter.rank=16", "trainer.save_every=6", "resume=auto"),
        result(run),
    )


@pytest.mark.parametrize("out", ["/dev/null/x", "taken", "taken/below", "locked/run"])
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_loaded(
    bench: Bench, out: str
) -> None:
    (bench.folder / "taken").write_text("a file")
    (bench.folder / "locked").mkdir(mode=0o500)
    if out.startswith("locked") and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    stopped = bench.train(out, faults=["count@loratune.pipeline.run.run"])
    check_told(stopped, 8, out.split("/")[-1])
    assert stopped.calls == []
    assert (bench.folder / "taken").read_text() == "a file"


def test_a_disk_that_is_clearly_too_small_is_said_before_training(bench: Bench) -> None:
    stopped = bench.train("run", faults=["zero@loratune.training.guards.free_bytes:1"])
    check_told(stopped, 8, "checkpoints need about", "0 are free")
    assert not (bench.folder / "run" / "checkpoints").exists()


def merge_words(bench: Bench, out: Path, base: Path) -> list[str]:
    if not (bench.folder / "run").exists():
        assert bench.train("run", "trainer.steps=4").code == 0
    return [
        "merge", f"adapter_path={bench.folder / 'run/adapter'}", f"model.path={base}", f"out={out}",
    ]  # fmt: skip


def test_a_merge_on_a_full_disk_publishes_nothing(bench: Bench) -> None:
    base = bench.shared / "base"
    before = tree(base)
    counted = bench.loratune(
        *merge_words(bench, bench.folder / "whole", base), faults=["count@os.fsync"]
    )
    assert counted.code == 0, counted.err

    def refuse(number: int) -> None:
        out = bench.folder / f"merged{number}" / "model"
        words = merge_words(bench, out, base)
        stopped = bench.loratune(*words, faults=[f"enospc@os.fsync:{number}"])
        TALLY.add("disk refusals injected")
        check_told(stopped, 8)
        if number < len(counted.calls):  # the last one comes after the model has appeared
            assert list(out.parent.iterdir()) == []
            assert bench.loratune(*words).code == 0

    in_parallel(refuse, range(1, len(counted.calls) + 1, 3))
    assert tree(base) == before


def test_a_shard_that_cannot_be_written_leaves_no_model(bench: Bench) -> None:
    from support.tiny_models import save_base, tiny_opt

    base = save_base(bench.folder / "sharded", tiny_opt(seed=0), max_shard_size="8KB")
    assert len(list(base.glob("model-*.safetensors"))) >= 3
    out = bench.folder / "merged" / "model"
    words = merge_words(bench, out, base)
    stopped = bench.loratune(
        *words, faults=["enospc@loratune.merging.safetensors_writer.SafetensorsWriter.write:9"]
    )
    TALLY.add("disk refusals injected")
    check_told(stopped, 8)
    assert list(out.parent.iterdir()) == []
    assert bench.loratune(*words).code == 0
