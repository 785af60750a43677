"""A run folder as plain values; what is missing or unreadable is simply not there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loratune import files
from loratune.compare.statistics import share_interval
from loratune.config.secrets import redact, redact_text
from loratune.runs.records import Record
from loratune.runs.run_dir import RunDir
from loratune.training.history import History


@dataclass(frozen=True)
class RunRecords:
    """What a run wrote down.

    Attributes:
        path: its folder.
        recipe: the resolved recipe.
        recipe_text: the same as it lies on disk, secrets hidden.
        history: what training recorded, step by step.
        parameters: the parameter report of all variants.
        data: what became of the rows.
        evaluation: base and adapted scores.
        merge: the merge's certificate.
        summary: what training came to.
        provenance: versions, machine, fingerprints.
        unreadable: names of files that are damaged.
    """

    path: Path
    recipe: Record
    recipe_text: str
    history: History = field(default_factory=History)
    parameters: Record = field(default_factory=dict)
    data: Record = field(default_factory=dict)
    evaluation: Record = field(default_factory=dict)
    merge: Record = field(default_factory=dict)
    summary: Record = field(default_factory=dict)
    provenance: Record = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()

    def setting(self, key: str, default: Any = None) -> Any:
        """A recipe's value by its dotted key."""
        value: Any = self.recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    @property
    def variant(self) -> str:
        """The adapter variant that was trained."""
        return str(self.setting("adapter.variant", "adapter"))

    @property
    def own_count(self) -> Record:
        """The parameter report's row of the variant that was trained."""
        rows = self.parameters.get("variants", [])
        return next((row for row in rows if row.get("variant") == self.variant), {})

    @property
    def adapted(self) -> Record:
        """Scores with the adapter; empty if nothing was evaluated."""
        return self.evaluation.get("adapted") or {}

    @property
    def evaluation_loss(self) -> float | None:
        """Of the adapter that the run keeps, else the best on the way."""
        loss = self.adapted.get("loss")
        return min(self.history.values("eval/loss"), default=None) if loss is None else float(loss)

    @property
    def exact_interval(self) -> tuple[float, float] | None:
        """95 % interval of exact match, if prompts were answered."""
        share, prompts = self.adapted.get("exact_match"), self.adapted.get("prompts")
        return share_interval(share * prompts, prompts) if share is not None and prompts else None

    @property
    def fingerprints(self) -> Record:
        """Part of the run to the sha256 of what it read."""
        return self.provenance.get("fingerprints") or {}

    @property
    def last_step(self) -> int:
        """The last optimizer step that was recorded."""
        return max((row["step"] for row in self.history.metrics), default=0)

    @property
    def peak_bytes(self) -> float | None:
        """Largest memory seen while training, on the GPU where there is one."""
        return max(self.history.values(self.memory_key), default=None)

    @property
    def memory_key(self) -> str:
        """Under which name memory was recorded."""
        gpu = "memory/peak_allocated_bytes"
        return gpu if self.history.values(gpu) else "memory/peak_resident_bytes"

    @property
    def train_seconds(self) -> float:
        """Seconds spent in recorded optimizer steps, over all parts of a resumed run."""
        return sum(self.history.values("train/step_seconds"))


def read_run(folder: Path) -> RunRecords:
    """Everything that lies in a run folder.

    Raises:
        ConfigError: if it is not a run folder.
    """
    run = RunDir.open(folder)
    damaged: list[str] = []
    text = run.recipe.read_text(encoding="utf-8", errors="replace")
    try:
        recipe = redact(yaml.safe_load(text))
    except yaml.YAMLError:
        recipe = None
    if not isinstance(recipe, dict):
        recipe, damaged = {}, [run.recipe.name]
    return RunRecords(
        path=run.path,
        recipe=recipe,
        recipe_text=redact_text(text),
        history=History.read(run.metrics, run.timings),
        parameters=_object(run.parameters, damaged),
        data=_object(run.data, damaged),
        evaluation=_object(run.evaluation, damaged),
        merge=_object(run.merge_report, damaged),
        summary=_object(run.summary, damaged),
        provenance=redact(_object(run.provenance, damaged)),
        unreadable=tuple(damaged),
    )


def _object(path: Path, damaged: list[str]) -> Record:
    try:
        value = files.read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        value = None
    if isinstance(value, dict):
        return value
    damaged.append(path.name)
    return {}
