from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from config.hostile import BOMBS, GLOBAL, HOSTILE, LINES
from loratune.config.recipes.files import check_recipe_files
from loratune.config.recipes.folders import builtin_recipes
from loratune.config.recipes.yaml_reader import MAX_BYTES
from loratune.errors import ConfigError, LoratuneError, SecurityError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    return tmp_path


def write(name: str, content: str | bytes) -> Path:
    path = Path("recipes") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def check(*folders: str) -> list[LoratuneError]:
    return check_recipe_files([Path(folder) for folder in folders or ("recipes",)])


def expect_one(kind: type[LoratuneError], where: str, *words: str) -> LoratuneError:
    errors = check()
    assert len(errors) == 1, [str(error) for error in errors]
    assert type(errors[0]) is kind
    assert errors[0].where.startswith(where), errors[0]
    for word in words:
        assert word in str(errors[0])
    return errors[0]


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: str(case).replace(" ", "-"))
def test_a_recipe_that_is_more_than_data_is_refused_with_its_line(here: Path, case: str) -> None:
    name, content, line = HOSTILE[case]
    write(name, content)
    security = [error for error in check() if isinstance(error, SecurityError)]
    assert security, [str(error) for error in check()]
    assert security[0].exit_code == 9
    assert security[0].where == f"recipes/{name}:{line}"
    assert not (here / "CANARY").exists()


MISTAKES = {
    "empty file": ("data/x.yaml", "", "recipes/data/x.yaml:1", "empty"),
    "only a comment": ("data/x.yaml", "# path: x\n", "recipes/data/x.yaml:1", "empty"),
    "list at the top": ("data/x.yaml", "- a\n", "recipes/data/x.yaml:1", "not a mapping"),
    "text at the top": ("data/x.yaml", "hello\n", "recipes/data/x.yaml:1", "not a mapping"),
    "tab": ("trainer/x.yaml", "a:\n\tb: 1\n", "recipes/trainer/x.yaml:2:1", "a tab"),
    "not UTF-8": ("data/x.yaml", b"path: a\nsplit: \xff\n", "recipes/data/x.yaml:2", "UTF-8"),
    "UTF-16": ("data/x.yaml", "path: a".encode("utf-16"), "recipes/data/x.yaml:1", "UTF-8"),
    "control character": ("data/x.yaml", b"path: \x01\n", "recipes/data/x.yaml:1", "#x0001"),
    "open bracket": ("data/x.yaml", "path: x\nlimit: [1\n", "recipes/data/x.yaml:3", "YAML"),
    "two documents": ("data/x.yaml", "path: x\n---\npath: y\n", "recipes/data/x.yaml:2", "YAML"),
    "duplicate key": ("trainer/x.yaml", "lr: 1\nsteps: 2\nlr: 2\n", "recipes/trainer/x.yaml:3",
                      "lines 1 and 3"),
    "duplicate in quotes": ("trainer/x.yaml", "lr: 1\n'lr': 2\n", "recipes/trainer/x.yaml:2",
                            "'trainer.lr' is set twice"),
    "unknown key": ("adapter/x.yaml", "defaults: [lora]\nrnak: 8\n", "recipes/adapter/x.yaml:2",
                    "'adapter.rnak' is not a setting"),
    "suggestion": ("adapter/x.yaml", "rnak: 8\n", "recipes/adapter/x.yaml:1",
                   "did you mean 'rank'?"),
    "another variant's key": ("adapter/x.yaml", "variant: lora\nlr_ratio: 8\n",
                              "recipes/adapter/x.yaml:2", "'adapter.lr_ratio'"),
    "unknown key of a recipe": ("recipe/x.yaml", f"{GLOBAL}trainer:\n  lrr: 1\n",
                                "recipes/recipe/x.yaml:3", "'trainer.lrr'"),
    "key in another place": ("recipe/x.yaml", f"{GLOBAL}rank: 8\n", "recipes/recipe/x.yaml:2",
                             "did you mean 'adapter.rank'?"),
    "value with keys below": ("trainer/x.yaml", "steps: {a: 1}\n", "recipes/trainer/x.yaml:1",
                              "'trainer.steps.a' is not a setting"),
    "wrong type": ("data/x.yaml", "path: a\nmax_length: eight\n", "recipes/data/x.yaml:2",
                   "data.max_length must be a whole number, got 'eight'"),
    "fraction": ("trainer/x.yaml", "steps: 2.5\n", "recipes/trainer/x.yaml:1", "2.5"),
    "null": ("trainer/x.yaml", "batch_size: null\n", "recipes/trainer/x.yaml:1", "None"),
    "not in the enumeration": ("trainer/x.yaml", "schedule: cosin\n", "recipes/trainer/x.yaml:1",
                               "one of constant, linear, cosine"),
    "group is text": ("recipe/x.yaml", f"{GLOBAL}trainer: fast\n", "recipes/recipe/x.yaml:2",
                      "a mapping of settings"),
    "reference for a group": ("recipe/x.yaml", f"{GLOBAL}trainer: ${{data}}\n",
                              "recipes/recipe/x.yaml:2", "a mapping of settings"),
    "no header": ("recipe/x.yaml", "name: x\n", "recipes/recipe/x.yaml:1", "# @package _global_"),
    "unknown group": ("adaptor/x.yaml", "rank: 8\n", "recipes/adaptor/x.yaml:1",
                      "did you mean 'adapter'?"),
    "unknown choice": ("recipe/x.yaml", f"{GLOBAL}defaults:\n  - override /adapter: vear\n",
                       "recipes/recipe/x.yaml:3", "did you mean 'vera'?"),
    "missing slash": ("recipe/x.yaml", f"{GLOBAL}defaults:\n  - override adapter: vera\nname: x\n",
                      "recipes/recipe/x.yaml:3", "write /adapter"),
    "defaults is a mapping": ("recipe/x.yaml", f"{GLOBAL}defaults: {{a: b}}\n",
                              "recipes/recipe/x.yaml:2", "must be a list"),
    "short suffix": ("data/x.yml", "path: a\n", "recipes/data/x.yml:1", ".yaml"),
    "primary config": ("config.yaml", "name: x\n", "recipes/config.yaml:1", "replace"),
    "byte order mark": ("data/x.yaml", b"\xef\xbb\xbfpath: a\n", "recipes/data/x.yaml:1",
                        "without BOM"),
    "alias in itself": ("model/x.yaml", "architecture: &a {b: *a}\n", "recipes/model/x.yaml:1",
                        "contains itself"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: str(case).replace(" ", "-"))
def test_a_mistake_is_one_line_that_names_file_and_line(here: Path, case: str) -> None:
    name, content, where, word = MISTAKES[case]
    write(name, content)
    error = expect_one(ConfigError, where, word)
    assert len(error.lines()) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("trainer:\n  lr: '2e-4'\n", "trainer.lr must be a number or null, got '2e-4'"),
        ('trainer:\n  steps: "5"\n', "trainer.steps must be a whole number"),
        ("trainer:\n  steps: yes\n", "trainer.steps must be a whole number"),
        ("trainer:\n  betas: ['0.9', 0.99]\n", "trainer.betas must be a list"),
        ("# a name\nname: no\n", "YAML reads no as False, and name is text"),
        ("# a name\nname: 3_000\n", "YAML reads 3_000 as 3000, and name is text"),
        ("data:\n  columns: {prompt: on}\n", "YAML reads on as True, and data.columns is text"),
        ("targets:\n  exclude: [1e3]\n", "YAML reads 1e3 as 1000.0, and targets.exclude is text"),
    ],
)
def test_no_value_becomes_one_of_another_type(here: Path, content: str, said: str) -> None:
    write("recipe/x.yaml", GLOBAL + content)
    (error,) = check()
    assert (said in str(error), error.exit_code) == (True, 2)
    assert error.where.startswith("recipes/recipe/x.yaml:3")


def test_text_that_yaml_leaves_alone_passes(here: Path) -> None:
    write("recipe/x.yaml", GLOBAL + "name: 'no'\ndata:\n  columns: {prompt: 5, text: q}\n")
    assert check() == []


def test_a_header_below_a_comment_is_reported_because_hydra_ignores_it(here: Path) -> None:
    write("recipe/x.yaml", f"# my recipe\n{GLOBAL}name: x\n")
    assert any("no effect" in error.cause and error.where.endswith(":2") for error in check())


def test_all_problems_are_reported_in_one_go(here: Path) -> None:
    write("trainer/a.yaml", "lrr: 1\nsteps: x\nseed: 1\nseed: 2\n")
    write("data/b.yaml", "pth: x\n_target_: os.system\n")
    places = [(error.where, error.exit_code) for error in check()]
    assert places == [
        ("recipes/data/b.yaml:1", 2),
        ("recipes/data/b.yaml:2", 9),
        ("recipes/trainer/a.yaml:1", 2),
        ("recipes/trainer/a.yaml:2", 2),
        ("recipes/trainer/a.yaml:4", 2),
    ]


def test_plain_recipes_pass(here: Path) -> None:
    write("adapter/mine.yaml", "defaults: [lora, _self_]\nrank: 16\nalpha: null\n")
    write("adapter/big.yaml", "defaults: [/schema/adapter/vera@_here_, _self_]\nd_initial: 0.1\n")
    write("model/mine.yaml", "path: a\narchitecture: {layers: 2, nested: {a: [1, {b: 2}]}}\n")
    write("data/mine.yaml", "path: ???\ncolumns: {prompt: question}\n")
    write(
        "recipe/mine.yaml",
        f"{GLOBAL}defaults:\n  - override /adapter: mine\nname: ${{model.path}}-${{.stages[0]}}\n"
        "trainer: {steps: 10, lr: 1e-3, warmup_steps: '${trainer.steps}', betas: [0.9, 0.99]}\n",
    )
    assert [str(error) for error in check()] == []


def test_the_built_in_recipes_pass(here: Path) -> None:
    shutil.copytree(builtin_recipes(), "mine")
    Path("mine/config.yaml").unlink()  # only the package's own root may configure Hydra
    shutil.rmtree("mine/study")  # a folder for --config-dir of its own
    assert [str(error) for error in check("mine")] == []


@pytest.mark.parametrize("name", ["adapter/.x.yaml", "recipe/__pycache__/x.yaml"])
def test_files_that_hydra_could_find_are_checked_even_if_hidden(here: Path, name: str) -> None:
    write(name, f"{LINES}\n")
    assert any(isinstance(error, SecurityError) for error in check())


def test_files_that_nothing_can_reach_are_left_alone(here: Path) -> None:
    write("README.md", "# mine\n")
    write(".git/x.yaml", f"{LINES}\n")
    (here / "recipes" / ".#x.yaml").symlink_to("me@machine.1")
    assert check() == []


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_with_its_place(here: Path, name: str) -> None:
    write("model/x.yaml", BOMBS[name])
    expect_one(ConfigError, "recipes/model/x.yaml")


def test_a_file_just_below_the_limit_of_size_is_read(here: Path) -> None:
    line = "  key{}: 1\n"
    text = "architecture:\n" + "".join(line.format(n) for n in range(20_000))
    write("model/x.yaml", text[: MAX_BYTES - 100].rpartition("\n")[0] + "\n")
    assert check() == []


def test_links_out_of_the_folder_are_refused(here: Path) -> None:
    (here / "outside").mkdir()
    (here / "outside" / "x.yaml").write_text("rank: 8\n")
    (here / "recipes" / "adapter").symlink_to(here / "outside")
    (here / "recipes" / "data").mkdir()
    (here / "recipes" / "data" / "y.yaml").symlink_to(here / "outside" / "x.yaml")
    errors = check()
    assert [error.where for error in errors] == ["recipes/adapter", "recipes/data/y.yaml"]
    assert {error.exit_code for error in errors} == {9}


def test_a_link_inside_the_folder_passes(here: Path) -> None:
    target = write("trainer/x.yaml", "steps: 1\n")
    (here / "recipes" / "trainer" / "y.yaml").symlink_to(here / target)
    assert check() == []


def test_a_fifo_is_refused_without_waiting(here: Path) -> None:
    (here / "recipes" / "data").mkdir()
    os.mkfifo("recipes/data/x.yaml")
    expect_one(SecurityError, "recipes/data/x.yaml", "plain file")


def test_a_folder_with_a_recipe_name_is_a_mistake(here: Path) -> None:
    (here / "recipes" / "data" / "x.yaml").mkdir(parents=True)
    expect_one(ConfigError, "recipes/data/x.yaml", "folder")


@pytest.mark.parametrize("name", ["hydra", "Hydra", "schema"])
def test_a_folder_that_shadows_hydra_or_the_schema_is_refused(here: Path, name: str) -> None:
    write(f"{name}/callbacks/x.yaml", "a: 1\n")
    expect_one(SecurityError, f"recipes/{name}")


def test_a_dangling_link_is_a_mistake(here: Path) -> None:
    (here / "recipes" / "data").mkdir()
    (here / "recipes" / "data" / "x.yaml").symlink_to(here / "recipes" / "none.yaml")
    expect_one(ConfigError, "recipes/data/x.yaml", "No such file")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_a_mistake(here: Path) -> None:
    write("data/x.yaml", "path: a\n").chmod(0)
    expect_one(ConfigError, "recipes/data/x.yaml", "Permission")


def test_checking_recipes_never_imports_torch() -> None:
    code = (
        "import sys; import loratune.config.recipes.files, loratune.config.overrides;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
