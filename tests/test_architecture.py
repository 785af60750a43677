"""Imports point strictly downward; what must answer at once never imports torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import loratune

PACKAGE = Path(loratune.__file__).parent

# One line per layer, from the ground up; a module may import its own layer and those below.
LAYERS: list[set[str]] = [
    {"errors", "console", "files"},
    {"adapters"},
    {
        "architectures", "patterns", "target_patterns", "target_errors", "targets", "surgery",
        "parameters", "parameter_tables", "budget", "rounding", "published", "measure",
        "activations", "adapter_checks", "peft_config", "peft_format", "config", "run_dir",
        "run_record", "checkpoint", "fingerprint", "weights",
        "model_source", "base_model", "drift", "provenance", "safetensors_writer",
        "offline_adapter", "delta_blocks", "mapped_tensors", "merging", "merge_plan",
        "tensor_threads", "merge_writer", "compact", "export_forms", "library",
    },
    {
        "data", "optim", "loss", "training", "generation", "stages", "merge_proof", "export_proof",
        "resume",
        "continuing", "variant_report",
    },
    {
        "pipeline", "later_stages", "tables", "trackers", "launch", "compare", "tune", "plan",
        "preview", "doctor", "verify", "report",
    },
    {"cli", "__main__"},
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the package that a file imports at run time, lazily or not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    rooms = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
            if node.module == "loratune":
                names = [f"loratune.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {n.split(".")[1] for n in names if n.startswith("loratune.") and n.count(".")}
    return rooms


def test_every_module_has_a_layer() -> None:
    rooms = {room_of(path) for path in modules()} - {"__init__"}
    assert rooms <= set(LEVEL), f"not in any layer: {sorted(rooms - set(LEVEL))}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    upward = {n for n in imported_rooms(path) & set(LEVEL) if LEVEL[n] > LEVEL[room]}
    assert not upward, f"{room} imports {sorted(upward)} from above"


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
        "loratune.config.schema", "loratune.config.convert", "loratune.targets",
        "loratune.parameters", "loratune.published", "loratune.weights", "loratune.drift",
    ],
)  # fmt: skip
def test_light_modules_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
