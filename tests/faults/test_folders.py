"""One run, one folder; and always a checkpoint in it that verifies."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from faults.conftest import Bench
from faults.harness import differences, result, tree
from faults.test_resume import cut, flip
from faults.verify import check_told, is_usable, verified_steps


def test_a_second_run_on_the_same_folder_stops_at_once_and_names_the_holder(bench: Bench) -> None:
    assert bench.train("solo", "trainer.steps=20").code == 0
    run = bench.folder / "run"
    slow = ["sleep@loratune.training.loop.train_step:0"]
    first = bench.start(run, "trainer.steps=20", faults=slow)
    first.wait_until(run / ".lock")
    time.sleep(0.05)  # from the lock's appearance to its holder's name
    for words in ((), ("resume=auto",)):
        second = bench.train(run, "trainer.steps=20", *words)
        assert not first.ended, "the second has waited for the first"
        check_told(second, 10, f"process {first.pid}" if words else "run")
    assert first.wait().code == 0
    assert not differences(result(run), result(bench.folder / "solo"))


def test_a_dead_holder_blocks_nobody(bench: Bench) -> None:
    run = bench.folder / "run"
    killed = bench.train(run, faults=["kill@loratune.training.loop.train_step:5"])
    assert killed.code == -signal.SIGKILL
    assert f"process {os.getpid()}" not in (run / ".lock").read_text()
    assert bench.train(run, "resume=auto").code == 0


def test_ten_starts_in_one_second_get_ten_folders(bench: Bench) -> None:
    words = [word for word in bench.words("x", "trainer.steps=3") if not word.startswith("out=")]
    cases = [bench.cli.start(*words, cwd=bench.folder) for _ in range(10)]
    assert all(case.wait(120).code == 0 for case in cases)
    runs = [path for path in (bench.folder / "outputs" / "run").iterdir() if not path.is_symlink()]
    assert len(runs) == 10
    assert all(verified_steps(run) == [3] for run in runs)
    latest = bench.folder / "outputs" / "run" / "latest"
    assert latest.is_symlink() and latest.resolve() in [run.resolve() for run in runs]


def test_an_occupied_folder_is_refused_and_not_touched(bench: Bench) -> None:
    run = bench.folder / "run"
    assert bench.train(run).code == 0
    before = tree(run)
    again = bench.train(run)
    check_told(again, 10, "step_000012", "resume=auto", "out=DIR")
    assert tree(run) == before


class Poller(threading.Thread):
    """Looks at a run's checkpoints every few milliseconds, as a reader would."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.run_folder, self.looks, self.bad = run, 0, []
        self._over = threading.Event()

    def run(self) -> None:
        appeared = False
        while not self._over.is_set():
            before = self._published()
            usable = self._usable(before)
            appeared = appeared or bool(usable)
            # What was replaced while this looked says nothing about any one instant.
            if appeared and not usable and before == self._published():
                self.bad.append([path.name for path in before])
            self.looks += 1
            time.sleep(0.004)

    def _published(self) -> list[Path]:
        return sorted((self.run_folder / "checkpoints").glob("step_*"))

    def _usable(self, folders: list[Path]) -> list[Path]:
        from loratune.runs.checkpoint import damage

        return [folder for folder in folders if not damage(folder)]

    def stop(self) -> None:
        self._over.set()
        self.join()


def test_rotation_keeps_the_best_and_the_last_and_a_verified_one_at_every_instant(
    bench: Bench,
) -> None:
    run = bench.folder / "run"
    words = ("trainer.keep_checkpoints=1", "trainer.eval_every=2", "trainer.save_every=1")
    words += ("trainer.lr=0.3", "trainer.schedule=constant", "trainer.steps=20")
    poller = Poller(run)
    poller.start()
    done = bench.train(run, *words)
    poller.stop()
    assert done.code == 0, done.err
    assert poller.looks > 20 and poller.bad == []
    import json

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["eval/loss"] for r in records if "eval/loss" in r}
    best = min(losses, key=lambda step: (losses[step], step))
    assert best != 20, "the recipe of this test should overshoot"
    assert verified_steps(run) == [best, 20]
    adapter = json.loads((run / "adapter" / "loratune.json").read_text())
    assert adapter["step"] == best


def test_a_corrupt_newest_checkpoint_is_set_aside_and_not_counted(bench: Bench) -> None:
    assert bench.train("whole").code == 0
    run = cut(bench.folder / "whole", bench.folder / "run", 9)
    flip(run / "checkpoints" / "step_000009" / "adapter.safetensors")
    resumed = bench.train(run, "trainer.keep_checkpoints=2", "resume=auto")
    assert resumed.code == 0, resumed.err
    assert verified_steps(run) == [9, 12] and is_usable(run)
    aside = [path.name for path in (run / "checkpoints").glob("damaged-*")]
    assert aside == ["damaged-step_000009-0"]


def test_readers_never_see_a_partial_adapter_or_model(bench: Bench) -> None:
    run = bench.folder / "run"
    seen: list[str] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            for folder, last in (("adapter", "loratune.json"), ("merged", "merge_report.json")):
                if (run / folder).is_dir() and not (run / folder / last).exists():
                    seen.append(folder)
            time.sleep(0.002)

    reader = threading.Thread(target=look)
    reader.start()
    slow = ["sleep@os.fsync:0"]
    done = bench.train(run, "trainer.steps=3", "stages=[train,merge]", faults=slow)
    over.set()
    reader.join()
    assert done.code == 0, done.err
    assert seen == []


def test_the_reader_of_a_pipe_that_goes_away_does_not_end_the_run(bench: Bench) -> None:
    run = bench.folder / "run"
    done = bench.train(run, faults=["closepipe@rich.console.Console.print:9"])
    assert done.code == 0, done.err
    assert verified_steps(run)[-1] == 12 and (run / "adapter").is_dir()
