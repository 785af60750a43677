"""``loratune verify``: check a published folder again, from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loratune.cli.arguments import TableOrJson, read_arguments
from loratune.errors import ConfigError

if TYPE_CHECKING:
    from loratune.verify import Verification

HELP = """usage: loratune verify DIR [model.path=BASE] [adapter_path=DIR] [format=table|json]

Checks a merged model, an export, an adapter, a checkpoint, or a run folder (DIR or
run=DIR) with all of these: seals, sizes, sha256 of every file, fingerprints of the tensors.

  model.path=BASE     also compare with the base model's weights
  adapter_path=DIR    also prove the merge again from base and adapter, to one rounding

Exit code 0 if everything is as it was published, 7 if not (6 for checkpoints)."""


def run(arguments: list[str]) -> None:
    """Verify the folder that the words name; print what was checked; raise what differs."""
    settings = {"run": (), "model.path": (), "adapter_path": (), "format": tuple(TableOrJson)}
    folders, values = read_arguments(arguments, settings)
    folders += [values["run"]] if "run" in values else []
    if len(folders) != 1:
        fix = "loratune verify DIR|run=DIR [model.path=BASE] [adapter_path=DIR]"
        raise ConfigError("name one folder to verify", where="loratune verify", fix=fix)
    form = values.get("format", "table")
    adapter, model = values.get("adapter_path"), values.get("model.path")
    if adapter and not model:
        fix = "add model.path=BASE"
        raise ConfigError("adapter_path needs the base model", where="adapter_path", fix=fix)
    from loratune.models.source import model_folder
    from loratune.verify import verify

    base = model_folder(model) if model else None
    adapters = [Path(path) for path in (adapter or "").strip("[]").split(",") if path]
    result = verify(Path(folders[0]), base, adapters)
    _show(result, form)
    result.raise_problems()


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
