"""Imports point strictly downward; what must answer at once never imports torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import fields
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import loratune
from loratune.adapters.config import AdapterConfig
from loratune.adapters.registry import config_class, variant_names

PACKAGE = Path(loratune.__file__).parent

# One line per layer, from the top down: a room imports only rooms of the lines below its own.
LAYERS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"plan"},
    {"pipeline", "doctor"},
    {"report"},
    {"compare", "verify"},
    {"stages"},
    {"training", "gguf_files"},
    {"generation"},
    {"data"},
    {"merging"},
    {"adapter_files", "counting"},
    {"library"},
    {"surgery"},
    {"targets"},
    {"models", "runs"},
    {"config"},
    {"adapters", "scoring", "tables"},
    {"loss", "files", "console"},
    {"errors", "units"},
]
LEVEL = {name: -depth for depth, names in enumerate(LAYERS) for name in names}
FLAT_MODULES = 8


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Other rooms of the package that a file imports: lazily, or for its types alone, or not."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
            if node.module == "loratune":
                names = [f"loratune.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {n.split(".")[1] for n in names if n.startswith("loratune.") and n.count(".")}
    return (rooms & set(LEVEL)) - {room_of(path)}


def test_every_module_has_a_layer() -> None:
    rooms = {room_of(path) for path in modules()} - {"__init__"}
    assert rooms <= set(LEVEL), f"not in any layer: {sorted(rooms - set(LEVEL))}"


def test_few_modules_lie_loose() -> None:
    loose = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert len(loose) <= FLAT_MODULES, sorted(loose)


def test_imports_point_strictly_downward_so_no_packages_import_in_a_circle() -> None:
    upward = [
        f"{path.relative_to(PACKAGE)} imports {room}"
        for path in modules()
        if room_of(path) != "__init__"
        for room in imported_rooms(path)
        if LEVEL[room] >= LEVEL[room_of(path)]
    ]
    assert not upward, upward


def imported_files(path: Path) -> set[Path]:
    """Files of the package that a file imports from, the packages' own ``__init__`` left out."""
    files = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loratune"):
            place = PACKAGE.parent / str(node.module).replace(".", "/")
            files |= {place.with_suffix(".py"), *(place / f"{a.name}.py" for a in node.names)}
    return {file for file in files if file.is_file() and file != path}


def test_no_files_import_in_a_circle() -> None:
    TopologicalSorter({path: imported_files(path) for path in modules()}).prepare()


def test_stages_never_import_each_other() -> None:
    for path in (PACKAGE / "stages").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("loratune.stages"), path.name


SAID_ELSEWHERE = {
    "lora": {
        "__init__.py", "library.py",  # the variant where none is asked for
        "doctor/training.py", "doctor/model.py",  # likewise
        "config/schema.py", "adapter_files/forms.py", "cli/__init__.py",  # the format of exports
        "adapter_files/plain_lora.py",  # the variant of such an export
        "verify/serving/llama_cpp.py",  # the format of exports
        "verify/serving/vllm.py", "report/card.py",  # options of vLLM
        "gguf_files/adapter_file.py",  # the kind of adapter that llama.cpp has
        "config/convert.py", "config/recipes/defaults.py",  # examples in messages
    },
    "vera": {"cli/commands/recipes.py"},  # an example
    "full": {  # the English word: trained in full, a full name, a full disk
        "adapter_files/embeddings.py", "adapter_files/peft_targets.py",
        "adapter_files/plain_lora.py",
        "config/recipes/defaults.py", "counting/parameters.py", "data/spans.py", "files.py",
        "merging/plan.py", "models/probes/layers.py", "plan/workload.py", "surgery.py",
        "targets/errors.py", "targets/roles.py", "verify/merged.py",
        "verify/serving/rules.py", "verify/serving/vllm.py",
    },
    "init": {"training/trackers.py", "cli/ray_jobs.py"},  # wandb.init, ray.init
    "lr_ratio": {  # what a comparison's files call the setting searched beside the rate
        "compare/result.py", "compare/assemble.py", "compare/plan.py", "compare/workbench.py",
        "compare/tables.py", "compare/tune.py",
    },
}  # fmt: skip
"""Names of variants and their settings that other files may say, and why."""


def words_of(path: Path) -> set[str]:
    """Identifiers, and the words in strings that are not docstrings.

    A local variable may be called as any setting is: its value comes from elsewhere, by a word.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    words: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and id(node) not in docstrings:
                words |= set(re.findall(r"\w+", node.value))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            words |= {part for name in names for part in name.split(".")}
        else:
            words |= {getattr(node, field, None) or "" for field in ("attr", "arg")}
    return words | local_names(tree) & set(variant_names())


def local_names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_no_module_names_a_variant_or_its_settings_but_its_own_folder() -> None:
    variants = variant_names()
    common = {field.name for field in fields(AdapterConfig)}
    own = {field.name for name in variants for field in fields(config_class(name))} - common
    said: dict[str, set[str]] = {}
    for path in modules():
        if path.parent.name not in variants:
            for word in words_of(path) & (own | set(variants)):
                said.setdefault(word, set()).add(path.relative_to(PACKAGE).as_posix())
    assert {"save_projection", "lr_ratio", "vera"} <= own | set(variants)
    for word, places in said.items():
        assert places <= SAID_ELSEWHERE.get(word, set()), f"{word} in {sorted(places)}"


def test_peft_trl_and_accelerate_are_never_imported() -> None:
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {n.split(".")[0] for n in names} & {"peft", "trl", "accelerate"}, path


@pytest.mark.parametrize(
    "module",
    [
        "loratune", "loratune.cli", "loratune.cli.dispatch", "loratune.cli.hydra_app",
        "loratune.config.schema", "loratune.config.convert", "loratune.targets.find",
        "loratune.counting.parameters", "loratune.counting.published", "loratune.models.weights",
        "loratune.runs.drift",
    ],
)  # fmt: skip
def test_light_modules_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
