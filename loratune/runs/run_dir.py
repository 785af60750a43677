"""One run, one folder: every path named once, who may write there, and what ``resume`` names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loratune import files
from loratune.config.schema import RunConfig
from loratune.errors import BusyError, ConfigError
from loratune.runs.checkpoint import published_checkpoints
from loratune.runs.lock import FolderLock
from loratune.runs.output import (
    OUTPUTS,
    RECIPE,
    TASK,
    check_output,
    check_unoccupied,
    check_writable,
    fresh_folder,
)

AUTO = "auto"
"""The value of ``resume`` that starts afresh where there is no checkpoint yet."""
SUMMARY = "summary.json"
PAGE = "report.html"
LOCK = ".lock"
MERGE_REPORT = "merge_report.json"
CERTIFICATE = "certificate.json"
"""In every merged model's folder, a run's or not."""


class RunDir:
    """The folder of one run (see ``create`` and ``open``)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / RECIPE
        self.provenance = path / "provenance.json"
        self.parameters = path / "parameters.json"
        self.metrics = path / "metrics.jsonl"
        self.timings = path / "timings.jsonl"
        self.data = path / "data.json"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.evaluation = path / "evaluation.json"
        self.golden = path / "golden.json"
        self.merged = path / "merged"
        self.merge_report = self.merged / MERGE_REPORT
        self.export = path / "export"
        self.report = path / PAGE
        self.summary = path / SUMMARY
        self.lock = path / LOCK
        self._lock = FolderLock(self.lock)
        self.hold, self.release = self._lock.hold, self._lock.release

    @classmethod
    def create(cls, config: RunConfig, patience: float = 0) -> RunDir:
        """Make (or, with ``resume``, reopen) the run's folder and hold it for this process.

        Args:
            config: the recipe.
            patience: seconds to wait for an earlier start that still holds it.

        Raises:
            BusyError: if another live process holds it, another run's results lie in it, or it
                lies inside the base model or the adapter that the run reads.
            StorageError: if it cannot be written.
        """
        check_output(config)
        if config.out is None:
            path = fresh_folder(OUTPUTS / config.name)
        else:
            path = Path(config.out)
            if config.resume is None:
                cls(path)._check_unoccupied()
            with files.storage_errors(path):
                path.mkdir(parents=True, exist_ok=True)
        run_dir = cls(path)
        run_dir.hold(patience)
        try:
            if config.resume is None:
                run_dir._check_unoccupied()  # again: another start may have been quicker
        except BusyError:
            run_dir.release()
            raise
        return run_dir

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Check for what would stop ``create``, without torch and without writing anything.

        Raises:
            BusyError: if another live process holds the folder, or another run lies in it.
            StorageError: if it cannot be written.
        """
        check_output(config)
        if config.out is None:
            return
        run_dir = cls(Path(config.out))
        if config.resume is None:
            run_dir._check_unoccupied()
        run_dir._lock.check_free()
        check_writable(run_dir.path)

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """An existing run's folder.

        Raises:
            ConfigError: if it is not one.
        """
        run_dir = cls(Path(path))
        if not run_dir.recipe.is_file():
            raise ConfigError(
                f"not a run folder: it has no {RECIPE}",
                where=str(path),
                fix="name a folder that `loratune train` made",
            )
        return run_dir

    def _check_unoccupied(self) -> None:
        """Stop rather than mix two runs.

        Raises:
            BusyError: if results of an earlier run lie here.
        """
        if not self.recipe.exists():
            check_unoccupied(self.path)
            return
        names = [path.name for path in published_checkpoints(self.checkpoints)]
        newest = f"newest checkpoint {names[-1]}" if names else "no checkpoint yet"
        raise BusyError(
            f"the folder holds an earlier run ({newest})",
            where=str(self.path),
            fix="continue it with resume=auto, or choose another out=DIR",
        )


def check_result_file(path: Path) -> None:
    """Check that a file to be written is not one of a model, an adapter, a checkpoint or a run.

    Raises:
        BusyError: if a model, an adapter or a checkpoint lies in its folder.
        ConfigError: if it is one of a finished run's records.
    """
    check_unoccupied(path.parent, besides=(RECIPE, TASK))
    if path.name in _sealed_records(path.parent):
        raise ConfigError(
            "a finished run's records are sealed", where=str(path), fix="set out to another file"
        )


def _sealed_records(folder: Path) -> set[str]:
    summary = RunDir(folder).summary
    try:
        return {summary.name, *files.read_json(summary)["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def names_checkpoint(resume: str) -> bool:
    """Whether ``resume=DIR`` names one checkpoint of a run and not the run."""
    return Path(resume).parent.name == "checkpoints"


def resumed_run(config: RunConfig) -> Path | None:
    """The run folder that ``resume=DIR`` names: the folder itself, or the run of a checkpoint."""
    if config.resume in (None, AUTO):
        return None
    path = Path(str(config.resume))
    return path.parent.parent if names_checkpoint(str(path)) else path


def with_run_folder(config: RunConfig) -> RunConfig:
    """The recipe whose ``out`` is the folder that ``resume=DIR`` names; others stay as they are.

    Raises:
        ConfigError: ``resume=auto`` without ``out``, or a folder that does not exist.
    """
    if config.resume == AUTO and config.out is None:
        raise ConfigError(
            "resume=auto needs the run's folder", where="resume", fix="set out=DIR, or resume=DIR"
        )
    run = resumed_run(config)
    if run is None:
        return config
    if not Path(str(config.resume)).is_dir():
        raise ConfigError(
            "no such folder", where=f"resume={config.resume}", fix="name a run or checkpoint folder"
        )
    return replace(config, out=str(run))
