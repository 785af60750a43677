"""Trackers: told every value, told no secret, kept in the run folder, never the end of a run."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from loratune.adapters.lora.config import LoRAConfig
from loratune.config.schema import RunConfig
from loratune.errors import ConfigError, LoratuneError
from loratune.runs.run_dir import RunDir
from loratune.training.record import Recorder
from loratune.training.trackers import check_trackers, open_trackers

NAMES = ["tensorboard", "wandb", "trackio"]
SECRET = "hf_abcdefghijklmnopqrst"


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


def config(*trackers: str) -> RunConfig:
    recipe = RunConfig(adapter=LoRAConfig(), trackers=list(trackers))
    recipe.data.path = f"https://me:{SECRET}@host/rows.jsonl"
    return recipe


class Fake:
    """Stands for a tracker's package and remembers everything it was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fails = False
        monkeypatch.setattr("loratune.training.trackers.find_spec", lambda _: SimpleNamespace())
        module = ModuleType(name)
        if name == "tensorboard":
            module = ModuleType("torch.utils.tensorboard")
            module.SummaryWriter = self._writer  # type: ignore[attr-defined]
        elif name == "wandb":
            module.init = self._start  # type: ignore[attr-defined]
            module.Settings = lambda **given: given  # type: ignore[attr-defined]
        else:
            module.init = self._start  # type: ignore[attr-defined]
            module.log = self.log  # type: ignore[attr-defined]
            module.finish = self.finish  # type: ignore[attr-defined]
            monkeypatch.setenv("TRACKIO_DIR", "restored to what it was after the test")
            monkeypatch.delenv("TRACKIO_DIR")
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def _writer(self, **given: Any) -> Fake:
        self.calls.append(("init", given))
        return self

    def _start(self, **given: Any) -> Fake:
        self.calls.append(("init", given))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self._maybe_fail()
        self.calls += [("value", (step, key, value)) for key, value in values.items()]

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self._maybe_fail()
        self.calls.append(("value", (step, key, value)))

    def _maybe_fail(self) -> None:
        if self.fails:
            raise ConnectionError("the server has gone")

    def finish(self) -> None:
        self.calls.append(("end", None))

    close = finish

    def of(self, kind: str) -> list[Any]:
        return [what for name, what in self.calls if name == kind]


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_gets_every_value_with_its_step_and_is_ended(
    name: str, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch, name)
    recorder = Recorder(run_dir, 2, open_trackers(config(name), run_dir))
    recorder.step(1, {"train/loss": 2.5, "train/lr": 0.1}, seconds=0.5, tokens=8, padded=10)
    recorder.evaluation(1, {"eval/loss": 2.25})
    recorder.close()
    told = {(step, key): value for step, key, value in fake.of("value")}
    assert told[1, "train/loss"] == 2.5
    assert told[1, "train/lr"] == 0.1
    assert told[1, "train/fill_rate"] == 0.8
    assert told[1, "eval/loss"] == 2.25
    assert len(fake.of("end")) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_is_told_no_secret_and_keeps_its_files_with_the_run(
    name: str, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch, name)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    open_trackers(config(name), run_dir)
    (given,) = fake.of("init")
    assert SECRET not in repr(given)
    assert "https://me:***@host" in repr(given) or name == "tensorboard"
    folder = given.get("log_dir") or given.get("dir") or os.environ["TRACKIO_DIR"]
    assert Path(folder).resolve().is_relative_to(run_dir.path.resolve())


def test_wandb_is_not_handed_command_line_code_console_or_git(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch, "wandb")
    open_trackers(config("wandb"), run_dir)
    settings = fake.of("init")[0]["settings"]
    assert settings["x_disable_meta"] and settings["disable_git"]
    assert settings["save_code"] is False
    assert settings["console"] == "off"


def test_a_resumed_run_goes_on_in_the_same_place(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    board, wandb = Fake(monkeypatch, "tensorboard"), Fake(monkeypatch, "wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    open_trackers(config("tensorboard", "wandb"), run_dir)
    open_trackers(config("tensorboard", "wandb"), run_dir, resumed_after=40)
    first, second = board.of("init")
    assert (first["purge_step"], second["purge_step"]) == (None, 41)
    first, second = wandb.of("init")
    assert first["id"] == second["id"]
    assert (first["resume"], second["resume"]) == (None, "allow")


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_fails_is_left_out_and_the_training_goes_on(
    name: str,
    run_dir: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = Fake(monkeypatch, name)
    recorder = Recorder(run_dir, 3, open_trackers(config(name), run_dir))
    fake.fails = True
    for step in (1, 2, 3):
        recorder.step(step, {"train/loss": 1.0, "train/lr": 0.1}, seconds=0.5, tokens=8, padded=8)
    recorder.close()
    shown = capsys.readouterr().out
    assert shown.count("failed and is left out from here: the server has gone") == 1
    lines = run_dir.metrics.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_tracker_that_does_not_start_is_one_error_and_ends_the_others(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    board, wandb = Fake(monkeypatch, "tensorboard"), Fake(monkeypatch, "wandb")

    def refuse(**_: Any) -> None:
        raise RuntimeError(f"no account for key {SECRET}")

    sys.modules["wandb"].init = refuse  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="'wandb' does not start: no account") as caught:
        open_trackers(config("tensorboard", "wandb"), run_dir)
    assert SECRET not in str(caught.value)
    assert "WANDB_MODE=offline" in str(caught.value)
    assert len(board.of("end")) == 1
    assert wandb.calls == []


def test_unknown_and_absent_trackers_are_all_named_before_anything_heavy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loratune.training.trackers.find_spec", lambda _: None)
    with pytest.raises(LoratuneError) as caught:
        check_trackers(["tensorbord", "trackio"])
    text = str(caught.value)
    assert "no tracker 'tensorbord'" in text
    assert "did you mean 'tensorboard'?" in text
    assert "'trackio' is not installed" in text
    assert "pip install 'loratune[trackio]'" in text
    check_trackers([])


def test_without_trackers_the_lines_are_written_all_the_same(run_dir: RunDir) -> None:
    recorder = Recorder(run_dir, 1)
    recorder.step(
        1, {"train/loss": 1.5, "train/lr": 0.1}, seconds=0.5, tokens=6, padded=8, dead=["layer"]
    )
    recorder.close()
    assert json.loads(run_dir.metrics.read_text()) == {
        "step": 1, "train/loss": 1.5, "train/lr": 0.1,
    }  # fmt: skip
    timing = json.loads(run_dir.timings.read_text())
    assert timing["train/step_seconds"] == 0.5
    assert timing["train/tokens_per_second"] == 12
    assert timing["train/fill_rate"] == 0.75
    assert timing["health/dead_names"] == ["layer"]


def test_only_the_first_process_records(run_dir: RunDir) -> None:
    recorder = Recorder(run_dir, 1, active=False)
    recorder.step(1, {"train/loss": 1.5, "train/lr": 0.1}, seconds=0.5, tokens=6, padded=8)
    recorder.evaluation(1, {"eval/loss": 1.0})
    recorder.close()
    assert list(run_dir.path.iterdir()) == []


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_real_tensorboard_reads_back_what_was_logged(run_dir: RunDir) -> None:
    (tracker,) = open_trackers(config("tensorboard"), run_dir)
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": 2.0 / step})
    tracker.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir.path / "tensorboard"))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert read == [(1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3))]


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_real_wandb_works_offline_and_writes_no_secret(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(sys, "argv", ["loratune", "train", f"token={SECRET}"])
    (tracker,) = open_trackers(config("wandb"), run_dir)
    tracker.log(1, {"train/loss": 2.0})
    tracker.close()
    written = [path for path in (run_dir.path / "wandb").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
