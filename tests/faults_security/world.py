"""A small world to break: base models, adapters, rows, and commands that must refuse them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.command_line import CommandLine, Outcome
from torch import Tensor

DEMO = Path(__file__).parents[2] / "loratune" / "assets" / "demo-opt"
PROMPTS = "".join(
    json.dumps({"prompt": f"Where is town {n}? ", "completion": f"in land {n}"}) + "\n"
    for n in range(12)
)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class World:
    """One test's folder, with what the whole session shares.

    Attributes:
        path: the test's own folder; commands run in it.
        cli: the command line.
        base: a base model, not to be changed.
        run: a finished run on it: LoRA on the attention, two steps.
        vera: the same with VeRA.
    """

    path: Path
    cli: CommandLine
    base: Path
    run: Path
    vera: Path

    @property
    def canary(self) -> Path:
        """The file that hostile input tries to make."""
        return self.path / "CANARY"

    def new_base(
        self,
        *,
        edit: Callable[[Path], object] | None = None,
        config: Mapping[str, Any] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        tensors: Callable[[Tensors], Tensors] | None = None,
    ) -> Path:
        """A copy of the base with one fault."""
        folder = self.path / f"base-{len(list(self.path.iterdir()))}"
        shutil.copytree(self.base, folder)
        update_json(folder / "config.json", config)
        update_json(folder / "tokenizer_config.json", tokenizer)
        if tensors is not None:
            rewrite(folder / "model.safetensors", tensors)
        if edit is not None:
            edit(folder)
        return folder

    def new_adapter(
        self,
        *,
        edit: Callable[[Path], object] | None = None,
        config: Mapping[str, Any] | None = None,
        tensors: Callable[[Tensors], Tensors] | None = None,
        sealed: bool = False,
        source: Path | None = None,
    ) -> Path:
        """A copy of the run's adapter with one fault; unsealed, it could be PEFT's own."""
        folder = self.path / f"adapter-{len(list(self.path.iterdir()))}"
        shutil.copytree((source or self.run) / "adapter", folder)
        if not sealed:
            (folder / "loratune.json").unlink()
        update_json(folder / "adapter_config.json", config)
        if tensors is not None:
            rewrite(folder / "adapter_model.safetensors", tensors)
        if edit is not None:
            edit(folder)
        return folder

    def rows(self, content: str | bytes, name: str = "rows.jsonl") -> Path:
        """A data file."""
        path = self.path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def run_here(self, *words: str, timeout: float = 60, **options: Any) -> Outcome:
        """Any command; hostile input may not hold it up."""
        return self.cli(*words, timeout=timeout, cwd=self.path, **options)

    def train(self, *words: str, base: Path | str | None = None, **options: Any) -> Outcome:
        """Two training steps, nothing after them."""
        return self.run_here(
            "train", "recipe=smoke", "trainer.steps=2", "trainer.save_every=0", "stages=[train]",
            f"model.path={base or self.base}", f"out={self.path / 'out'}", *words,
            **options,
        )  # fmt: skip

    def merge(
        self, adapter: Path, *words: str, base: Path | None = None, **options: Any
    ) -> Outcome:
        """Merge an adapter into the base."""
        return self.run_here(
            "merge", f"adapter_path={adapter}", f"model.path={base or self.base}",
            f"out={self.path / 'merged'}", *words, **options,
        )  # fmt: skip

    def left(self) -> list[str]:
        """Names that a refused command left behind."""
        made = ["out", "merged", "export", "outputs"]
        found = [name for name in made if (self.path / name).exists()]
        return found + [path.name for path in self.path.rglob(".tmp-*")]


def update_json(path: Path, values: Mapping[str, Any] | None) -> None:
    if values is not None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path)


def refused(outcome: Outcome, code: int, *named: str) -> None:
    """The contract of every refusal: its code, one clear line last, no traceback, no bug."""
    assert "Traceback" not in outcome.text, outcome.text[-3000:]
    assert outcome.code == code, (outcome.code, outcome.err[-2000:])
    assert outcome.last.startswith(f"error[{code}] "), outcome.err
    assert "; " in outcome.last, "cause; where; fix"
    for words in named:
        assert words in outcome.err, f"{words!r} is not named in {outcome.err!r}"


def unchanged(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, to compare before and after."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


case = pytest.param
