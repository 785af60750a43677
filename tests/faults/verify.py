"""What must hold of a run folder after any fault."""

from __future__ import annotations

import json
from pathlib import Path

from support.command_line import Outcome

from faults.harness import differences, leftovers, result
from faults.tally import TALLY


def verified_steps(run: Path) -> list[int]:
    """Steps of the published checkpoints; every one of them must verify.

    Written without the package: sizes and sha256 by hand, so that it can be wrong independently.
    """
    import hashlib

    steps = []
    for folder in sorted((run / "checkpoints").glob("step_*")):
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, entry in manifest["files"].items():
            content = (folder / name).read_bytes()
            assert len(content) == entry["bytes"], f"{folder.name}/{name}"
            assert hashlib.sha256(content).hexdigest() == entry["sha256"], f"{folder.name}/{name}"
        assert manifest["step"] == int(folder.name.removeprefix("step_"))
        steps.append(manifest["step"])
    return steps


def is_usable(run: Path) -> bool:
    """Whether the newest published checkpoint (if any) verifies."""
    try:
        verified_steps(run)
    except (AssertionError, OSError, ValueError, KeyError):
        return False
    return True


def logged_steps(run: Path) -> list[int]:
    """Steps with a training loss in metrics.jsonl, as far as the file was written."""
    steps = []
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "train/loss" in record:
            steps.append(record["step"])
    return steps


def check_killed(run: Path, save_every: int) -> None:
    """After a kill: the newest checkpoint is whole, and at most one save interval is lost."""
    usable = is_usable(run)
    TALLY.add("newest checkpoints found unusable after a kill", 0 if usable else 1)
    assert usable, f"unusable newest checkpoint in {run}"
    done, saved = max(logged_steps(run), default=0), max(verified_steps(run), default=0)
    lost = done - saved
    TALLY.add("steps lost beyond one save interval", max(0, lost - save_every))
    assert lost <= save_every, f"{done} steps done, {saved} saved"


def check_recovered(run: Path, outcome: Outcome, undisturbed: dict[str, str]) -> None:
    """After the next start: done, the same bytes as never disturbed, nothing left over."""
    assert outcome.code == 0, outcome.err
    assert not outcome.has_traceback
    different = differences(result(run), undisturbed)
    TALLY.add("runs whose final bytes differ from the undisturbed run", bool(different))
    assert not different, different
    left = leftovers(run)
    TALLY.add("leftovers not cleaned", len(left))
    assert not left, left


def check_told(outcome: Outcome, code: int, *words: str) -> None:
    """The user was told in one line, with that code, and those words."""
    assert outcome.code == code, f"exit {outcome.code}\n{outcome.out}\n{outcome.err}"
    assert not outcome.has_traceback, outcome.err
    assert outcome.last.startswith(f"error[{code}] "), outcome.err
    for word in words:
        assert word in outcome.err, f"{word!r} not in {outcome.err}"
