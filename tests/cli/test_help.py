"""Help, versions, and Hydra's own flags."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import loratune as package
from loratune.adapters.registry import variant_names
from loratune.cli import COMMANDS


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_the_help_names_every_command(words, cli):
    code, out, _ = cli(*words)
    assert code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in out


def test_the_version_is_the_packages(cli):
    code, out, err = cli("--version")
    assert (code, out, err) == (0, f"{package.__version__}\n", "")


def test_python_m_is_the_same_program(tmp_path):
    command = [sys.executable, "-m", "loratune", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (result.returncode, result.stdout) == (0, f"{package.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_table_exists_and_helps(command, cli):
    module = import_module(f"loratune.cli.commands.{command.replace('-', '_')}")
    code, out, err = cli(command, "--help")
    assert (code, err) == (0, "")
    assert f"loratune {command}" in out.splitlines()[0]
    if hasattr(module, "Config"):
        assert f"adapter: {', '.join(variant_names())}" in out
        assert "schema/adapter" not in out


def test_a_misspelt_command_is_recognised(cli):
    code, _, err = cli("tarin")
    assert code == 2
    assert err == "error[2] no command 'tarin'; loratune; did you mean 'train'?\n"


def test_cfg_job_prints_what_would_run_and_runs_nothing(cli):
    code, out, _ = cli("train", "recipe=smoke", "adapter=vera", "--cfg", "job")
    assert code == 0
    assert "name: smoke" in out and "variant: vera" in out
    assert not list(Path().iterdir())


def test_info_says_where_values_come_from(cli):
    code, out, _ = cli("train", "recipe=smoke", "--info", "defaults")
    assert code == 0
    assert "trainer/smoke" in out and "recipe/smoke" in out
    code, out, _ = cli("train", "--info", "searchpath")
    assert code == 0 and "main" in out


def test_a_config_dir_adds_recipes(composed, tmp_path):
    folder = tmp_path / "elsewhere" / "trainer"
    folder.mkdir(parents=True)
    (folder / "long.yaml").write_text("steps: 1234\n", encoding="utf-8")
    config = composed("trainer=long", "--config-dir", str(folder.parent))
    assert config.trainer.steps == 1234


def test_own_rows_need_two_words(composed):
    config = composed("data=local", "data.path=rows.jsonl")
    assert config.data.path == "rows.jsonl"
    assert config.data.split_by == "prompt"


def test_own_rows_without_a_path_say_which_word_is_missing(cli):
    code, _, err = cli("train", "data=local")
    assert code == 2
    assert err == "error[2] there are no rows to train on; data.path; set data.path=FILE\n"


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["train", "--cfg", "job"], ["recipes"], ["-V"]]
)
def test_a_reader_that_has_gone_is_no_error(words: list[str]) -> None:
    command = [sys.executable, "-m", "loratune", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)
