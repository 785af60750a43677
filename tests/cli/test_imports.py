"""What answers at once may not import what takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loratune.cli import commands

HEAVY = {"torch", "transformers", "datasets", "safetensors", "numpy", "pandas", "peft"}
PROBE = """
import sys
before = set(sys.modules)
from loratune.cli import main
sys.argv = ["loratune", *sys.argv[1:]]
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
new = sorted(name for name in set(sys.modules) - before)
print("IMPORTED", code, *new)
"""


def run_python(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """A fresh interpreter."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def imported(*words: str, **options) -> tuple[int, set[str]]:
    result = run_python(PROBE, *words, **options)
    line = next(x for x in result.stdout.splitlines() if x.startswith("IMPORTED"))
    _, code, *modules = line.split()
    return int(code), set(modules)


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_the_first_answer_imports_nothing_but_the_package_itself(flag):
    code, modules = imported(flag)
    assert code == 0
    own = {name for name in modules if name.partition(".")[0] == "loratune"}
    assert own == {"loratune", "loratune.cli"}
    assert {name.partition(".")[0] for name in modules - own} <= sys.stdlib_module_names
    assert not modules & {"argparse", "dataclasses", "inspect", "logging", "subprocess"}


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--help"),
        ("train", "recipe=demo", "--cfg", "job"),
        ("count-params", "model=opt_125m", "targets=attention_qv", "rank=16"),
        ("count-params", "published=true"),
        ("recipes", "ls"),
        ("recipes", "show", "demo"),
    ],
    ids=" ".join,
)
def test_a_question_about_a_recipe_imports_no_tensor_library(words, tmp_path):
    code, modules = imported(*words, cwd=tmp_path)
    assert code == 0
    assert not modules & HEAVY


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train", "adapter.rnak=8"), 2),
        (("train", "recipe=nope"), 2),
        (("train", "trainer.batch_size=0"), 2),
        (("tarin",), 2),
    ],
    ids=str,
)
def test_a_config_error_is_told_before_anything_heavy_is_imported(words, expected, tmp_path):
    code, modules = imported(*words, cwd=tmp_path)
    assert code == expected
    assert not modules & HEAVY
    assert list(tmp_path.iterdir()) == []


def test_the_pipeline_imports_no_machinery_of_sharding_and_compiling():
    result = run_python("import sys, loratune.pipeline.run; print(*sorted(sys.modules))")
    modules = set(result.stdout.split())
    assert "loratune.training.sharding" in modules
    assert not modules & {"torch.distributed.fsdp", "torch._inductor"}


def test_no_command_imports_another():
    folder = Path(commands.__file__).parent
    importers = [
        path.name
        for path in folder.glob("*.py")
        if "loratune.cli.commands" in path.read_text(encoding="utf-8")
    ]
    assert importers == []
