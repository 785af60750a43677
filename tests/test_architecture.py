"""Imports point strictly downward; what must answer at once never imports torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import loratune

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
    {"training"},
    {"generation"},
    {"data"},
    {"merging"},
    {"adapter_files", "counting"},
    {"library"},
    {"surgery"},
    {"targets"},
    {"models", "runs"},
    {"config"},
    {"adapters", "tables"},
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


def test_stages_never_import_each_other() -> None:
    for path in (PACKAGE / "stages").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("loratune.stages"), path.name


def test_no_module_names_a_variant_but_its_own_folder() -> None:
    from loratune.adapters.registry import variant_names

    for path in modules():
        inside = path.parent.name in variant_names()
        text = path.read_text(encoding="utf-8")
        for name in variant_names():
            if not inside:
                assert f"adapters.{name}" not in text, f"{path} imports the variant {name}"


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
