"""A base named by a relative path is found again from any folder, or said to be missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from support.command_line import CommandLine
from support.tiny_models import save_base, tiny_opt

from loratune.files import BUILTIN
from loratune.models.source import recorded_path


@pytest.fixture
def run(cli: CommandLine, tmp_path: Path) -> Path:
    """A run on the base ``tinybase`` of its own folder."""
    here = tmp_path / "here"
    save_base(here / "tinybase", tiny_opt())
    (here / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    words = ("recipe=smoke", "data=local", "data.path=rows.jsonl", "data.eval_fraction=0")
    model = ("model.path=tinybase", "stages=[train]", "trainer.steps=1", "out=out")
    cli.succeeds("train", *words, *model, cwd=here)
    (tmp_path / "elsewhere").mkdir()
    return here / "out"


def test_later_commands_find_it_from_any_folder(cli: CommandLine, run: Path) -> None:
    elsewhere = {"cwd": run.parent.parent / "elsewhere"}
    base = str(run.parent / "tinybase")
    assert yaml.safe_load((run / "recipe.yaml").read_text())["model"]["path"] == base
    peft = json.loads((run / "adapter/adapter_config.json").read_text())
    assert peft["base_model_name_or_path"] == base
    cli.succeeds("merge", "run=../here/out", "out=merged", **elsewhere)
    cli.succeeds("generate", "run=../here/out", "prompt=a", "max_new_tokens=1", **elsewhere)
    adapter = "adapter_path=../here/out/adapter"
    cli.succeeds("generate", adapter, "prompt=a", "max_new_tokens=1", **elsewhere)


def test_a_folder_that_is_gone_is_said_to_be_missing(cli: CommandLine, run: Path) -> None:
    base = run.parent / "tinybase"
    shutil.rmtree(base)
    elsewhere = {"cwd": run.parent.parent / "elsewhere"}
    for source in ("run=../here/out", "adapter_path=../here/out/adapter"):
        error = cli.refuses("generate", source, "prompt=a", **elsewhere)
        assert "no such folder" in error and str(base) in error and "hub is" not in error


def test_only_what_is_a_folder_becomes_a_whole_path(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    assert recorded_path("base") == str(tmp_path / "base")
    assert recorded_path("./nowhere") == str(tmp_path / "nowhere")
    assert recorded_path("owner/name") == "owner/name"
    assert recorded_path(f"{BUILTIN}demo-opt") == f"{BUILTIN}demo-opt"


def test_a_name_that_is_neither_folder_nor_on_the_hub_is_called_both(cli: CommandLine) -> None:
    error = cli.refuses("train", "recipe=smoke", "model.path=tinybase", "out=out")
    assert "there is no folder 'tinybase' here, and the hub did not give it" in error
