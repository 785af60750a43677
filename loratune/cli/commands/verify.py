"""``loratune verify``: check a published folder again, or a server of what it holds."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.cli.arguments import TableOrJson, read_arguments
from loratune.errors import ConfigError, choose_one

if TYPE_CHECKING:
    from loratune.verify import Verification

HELP = """usage: loratune verify DIR [model.path=BASE] [adapter_path=DIR] [format=table|json]
       loratune verify target=vllm|sglang|llama.cpp|ollama run=DIR [model.path=BASE]
       loratune verify served=URL run=DIR [served_model=NAME] [timeout=60] [golden=FILE]

Checks a merged model, an export, an adapter, a checkpoint, or a run folder (DIR or
run=DIR) with all of these: seals, sizes, sha256 of every file, fingerprints of the tensors.

  model.path=BASE     also compare with the base model's weights
  adapter_path=DIR    also prove the merge again from base and adapter, to one rounding

With target, checks the adapter of a run, an adapter or an export against the rules of a server,
each with the export that satisfies it.

With served, asks an OpenAI-compatible server the golden prompts of a run, and compares its answers
and log-probabilities with the recorded ones of the adapted and the base model.

  served_model=NAME   the model to ask for, where the server has several
  timeout=SECONDS     for each answer
  golden=FILE         the golden prompts; by default golden.json in the run folder

Exit code 0 if everything is as it was published, or as the server needs it, or as the run
answered; 7 if not (6 for checkpoints)."""

_SETTINGS: dict[str, tuple[str, ...]] = {
    "run": (), "model.path": (), "adapter_path": (), "format": tuple(TableOrJson),
    "target": (), "served": (), "served_model": (), "timeout": (), "golden": (),
}  # fmt: skip
_ASKING = ("served_model", "timeout", "golden")
"""Settings of questions to a server."""


def run(arguments: list[str]) -> None:
    """Verify the folder that the words name; print what was checked; raise what differs."""
    folders, values = read_arguments(arguments, _SETTINGS)
    folders += [values["run"]] if "run" in values else []
    if len(folders) != 1:
        fix = "loratune verify DIR|run=DIR [model.path=BASE] [adapter_path=DIR]"
        raise ConfigError("name one folder to verify", where="loratune verify", fix=fix)
    _check_together(values)
    folder = Path(folders[0])
    if "served" in values:
        result = _served(folder, values)
    elif "target" in values:
        result = _target(folder, values)
    else:
        result = _published(folder, values)
    _show(result, values.get("format", "table"))
    result.raise_problems()


def _check_together(values: Mapping[str, str]) -> None:
    """Raise where settings have no effect together.

    Raises:
        ConfigError: naming them.
    """
    if "served" in values and "target" in values:
        cause = "a server's rules and its answers are two questions"
        raise ConfigError(cause, where="target, served", fix="set one of them")
    unused = [key for key in _ASKING if key in values and "served" not in values]
    if "served" in values:
        unused += [key for key in ("model.path", "adapter_path") if key in values]
    if "target" in values:
        unused += [key for key in ("adapter_path",) if key in values]
    if unused:
        raise ConfigError(f"'{unused[0]}' has no effect here", where=unused[0], fix="remove it")


def _published(folder: Path, values: Mapping[str, str]) -> Verification:
    """Whether a folder is as it was published."""
    adapter, model = values.get("adapter_path"), values.get("model.path")
    if adapter and not model:
        fix = "add model.path=BASE"
        raise ConfigError("adapter_path needs the base model", where="adapter_path", fix=fix)
    from loratune.models.source import model_folder
    from loratune.verify import verify

    base = model_folder(model) if model else None
    adapters = [Path(path) for path in (adapter or "").strip("[]").split(",") if path]
    return verify(folder, base, adapters)


def _target(folder: Path, values: Mapping[str, str]) -> Verification:
    """Whether an adapter obeys a server's rules."""
    from loratune.models.source import model_folder
    from loratune.verify.serving import Server, verify_target

    if values["target"] not in tuple(Server):
        cause = f"no rules of a server '{values['target']}'"
        raise ConfigError(cause, where="target", fix=choose_one(values["target"], tuple(Server)))
    model = values.get("model.path")
    base = model_folder(model) if model else None
    return verify_target(Server(values["target"]), folder, base)


def _served(folder: Path, values: Mapping[str, str]) -> Verification:
    """Whether a server serves a run's adapted model."""
    from loratune.runs.run_dir import RunDir
    from loratune.verify.served import verify_served

    golden = Path(values["golden"]) if "golden" in values else RunDir.open(folder).golden
    return verify_served(
        values["served"], golden, values.get("served_model"), _seconds(values.get("timeout", "60"))
    )


def _seconds(text: str) -> float:
    """``timeout`` as a number.

    Raises:
        ConfigError: if it is not a positive one.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise ConfigError(f"timeout is {text}", where="timeout", fix="use a number of seconds")
    return seconds


def _show(result: Verification, form: str) -> None:
    from loratune import files
    from loratune.console import say

    if form == "json":
        print(files.to_json(result.to_dict()), end="")
        return
    lines = _lines(result)
    width = max(len(place) for place, _ in lines)
    say(f"{result.kind} {result.folder}")
    for place, text in lines:
        say(f"  {place:<{width}}  {text}")
    if not result.problems:
        say(f"verified: {len(result.checks)} checks, nothing differs")


def _lines(result: Verification) -> list[tuple[str, str]]:
    """Place and finding; files of one folder that are as recorded share a line."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for check in result.checks:
        folder, _, name = check.item.rpartition("/")
        detail = check.problem or check.note
        place = folder or "."
        if check.problem or not name.strip("."):
            place = check.item.removesuffix("/.")
        groups.setdefault((place, f"{check.status:<11}  {check.what}", detail), []).append(name)
    return [
        (place, f"{text} ({len(names)} files)" if len(names) > 1 else f"{text}{_after(detail)}")
        for (place, text, detail), names in groups.items()
    ]


def _after(detail: str) -> str:
    return f": {detail}" if detail else ""
