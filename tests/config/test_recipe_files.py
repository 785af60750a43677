from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loratune.config.recipes.files import check_recipe_files
from loratune.config.recipes.folders import builtin_recipes
from loratune.config.recipes.yaml_reader import MAX_BYTES
from loratune.errors import ConfigError, LoratuneError, SecurityError

GLOBAL = "# @package _global_\n"


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


TARGET = "_target_: pathlib.Path.touch"
HOSTILE = {
    "target at the top": ("recipe/x.yaml", f"{GLOBAL}{TARGET}\n", 2),
    "target in a group": ("trainer/x.yaml", f"steps: 1\n{TARGET}\n", 2),
    "target in a free mapping": ("model/x.yaml", f"architecture:\n  a: {{{TARGET}}}\n", 2),
    "target inside a list": ("targets/x.yaml", f"modules:\n  - a\n  - {{{TARGET}}}\n", 3),
    "target in nested lists": ("targets/x.yaml", f"modules: [[[{{{TARGET}}}]]]\n", 1),
    "target in an unknown key": ("trainer/x.yaml", "steps: 1\nlr: {_target_: os.system}\n", 2),
    "target through a merge key": (
        "model/x.yaml",
        f"architecture:\n  a: &g {{{TARGET}}}\n  b: {{<<: *g}}\n",
        2,
    ),
    "target in quotes": ("trainer/x.yaml", '"\\x5ftarget_": os.system\n', 1),
    "target as a complex key": ("trainer/x.yaml", "? _target_\n: os.system\n", 1),
    "partial": ("trainer/x.yaml", "_partial_: true\n", 1),
    "args": ("trainer/x.yaml", "_args_: [x]\n", 1),
    "recursive": ("trainer/x.yaml", "_recursive_: true\n", 1),
    "convert": ("trainer/x.yaml", "_convert_: all\n", 1),
    "hydra node": (
        "recipe/x.yaml",
        f"{GLOBAL}hydra:\n  callbacks:\n    a: {{{TARGET}}}\n",
        2,
    ),
    "hydra node in quotes": ("recipe/x.yaml", f"{GLOBAL}'hydra': {{run: {{dir: /tmp/x}}}}\n", 2),
    "hydra dotted key": ("recipe/x.yaml", f"{GLOBAL}hydra.run.dir: /tmp/x\n", 2),
    "hydra through a merge key": (
        "recipe/x.yaml",
        f"{GLOBAL}<<: {{hydra: {{run: {{dir: x}}}}}}\n",
        2,
    ),
    "hydra header": ("recipe/x.yaml", "# @package hydra\nrun: {dir: /tmp/x}\n", 1),
    "hydra header, dotted": ("recipe/x.yaml", "# @package hydra.callbacks\na: 1\n", 1),
    "hydra header after a first one": (
        "recipe/x.yaml",
        f"{GLOBAL}\n  #   @package   hydra.job\nx: 1\n",
        3,
    ),
    "hydra header without space": ("recipe/x.yaml", "#@package hydra.run\ndir: x\n", 1),
    "hydra header below global": ("recipe/x.yaml", "# @package _global_.hydra.run\ndir: x\n", 1),
    "hydra header, last global wins": (
        "recipe/x.yaml",
        "# @package adapter_global_.hydra.run\ndir: x\n",
        1,
    ),
    "hydra header, hidden global": ("recipe/x.yaml", "# @package a_global_xhydra\nrun: 1\n", 1),
    "hydra header, brackets": ("recipe/x.yaml", "# @package [hydra]\nrun: {dir: x}\n", 1),
    "hydra header after a form feed": (
        "recipe/x.yaml",
        b"# @package _global_\x0c# @package hydra.run\ndir: x\n",
        2,
    ),
    "override of a hydra group": (
        "recipe/x.yaml",
        f"{GLOBAL}defaults:\n  - override /hydra/launcher: joblib\nname: x\n",
        3,
    ),
    "hydra group, absolute": ("recipe/x.yaml", "defaults:\n  - /hydra/callbacks: x\n", 2),
    "hydra group, relative": ("recipe/x.yaml", "defaults:\n  - hydra/callbacks: x\n", 2),
    "hydra group, spaces": ("recipe/x.yaml", "defaults: ['override   /hydra/sweeper: x']\n", 1),
    "hydra as a plain path": ("recipe/x.yaml", "defaults: [/hydra/job_logging/none]\n", 1),
    "hydra group with package": ("recipe/x.yaml", "defaults: [{'hydra@_global_': x}]\n", 1),
    "group into hydra": ("recipe/x.yaml", "defaults: [{'/model@hydra': demo}]\n", 1),
    "group into global hydra": (
        "recipe/x.yaml",
        "defaults: [{'/model@_global_.hydra.run': demo}]\n",
        1,
    ),
    "group into hidden global": (
        "recipe/x.yaml",
        "defaults: [{'/model@a._global_.hydra': demo}]\n",
        1,
    ),
    "path into the parent folder": ("recipe/x.yaml", "defaults: [../../etc/x]\n", 1),
    "choice in the parent folder": ("recipe/x.yaml", "defaults: [{/model: ../hydra/x}]\n", 1),
    "choice list in the parent": ("recipe/x.yaml", "defaults: [{/model: [demo, ../x]}]\n", 1),
    "absolute file": ("recipe/x.yaml", "defaults: [//etc/passwd]\n", 1),
    "absolute choice": ("recipe/x.yaml", "defaults: [{/model: /etc/x}]\n", 1),
    "file scheme": ("recipe/x.yaml", "defaults: ['file:///etc/x']\n", 1),
    "package scheme": ("recipe/x.yaml", "defaults: ['pkg://hydra.conf/x']\n", 1),
    "resolver in defaults": ("recipe/x.yaml", "defaults: [{/model: '${oc.env:X}'}]\n", 1),
    "path built in defaults": ("recipe/x.yaml", "defaults: [{/model: 'a/${data}'}]\n", 1),
    "environment": ("recipe/x.yaml", f"{GLOBAL}name: ${{oc.env:AWS_SECRET_ACCESS_KEY}}\n", 2),
    "environment with default": ("recipe/x.yaml", f"{GLOBAL}name: '${{oc.env:X,y}}'\n", 2),
    "environment in text": ("data/x.yaml", "template: 'a ${oc.env:X} b'\n", 1),
    "environment with spaces": ("data/x.yaml", "template: '${  oc.env : X }'\n", 1),
    "environment in a list": ("targets/x.yaml", "modules: [a, '${oc.env:X}']\n", 1),
    "environment in a free mapping": ("data/x.yaml", "columns: {a: '${oc.env:X}'}\n", 1),
    "decode": ("data/x.yaml", "limit: ${oc.decode:'1'}\n", 1),
    "create": ("data/x.yaml", "columns: \"${oc.create:'{a: b}'}\"\n", 1),
    "keys of a mapping": ("targets/x.yaml", "modules: ${oc.dict.keys:data}\n", 1),
    "hydra resolver": ("data/x.yaml", "template: ${hydra:runtime.cwd}\n", 1),
    "hydra reference": ("data/x.yaml", "template: ${hydra.runtime.cwd}\n", 1),
    "hydra reference, relative": ("data/x.yaml", "template: ${..hydra.job.name}\n", 1),
    "nested reference": ("data/x.yaml", "template: ${${name}}\n", 1),
    "computed reference": ("data/x.yaml", "template: '${a${name}}'\n", 1),
    "unclosed reference": ("data/x.yaml", "template: '${name'\n", 1),
    "python tag": ("data/x.yaml", "path: !!python/object/apply:os.system ['touch canary']\n", 1),
    "python path tag": ("data/x.yaml", "path: !!python/object/apply:pathlib.Path [canary]\n", 1),
    "python name": ("data/x.yaml", "path: !!python/name:os.system ''\n", 1),
    "python tag on the top": ("data/x.yaml", "!!python/dict\npath: x\n", 1),
    "python tag on a key": ("data/x.yaml", "!!python/name:os.system '': x\n", 1),
    "python tag by handle": (
        "data/x.yaml",
        "%TAG ! tag:yaml.org,2002:python/\n---\npath: !name:os.system ''\n",
        3,
    ),
    "python tag in defaults": ("data/x.yaml", "defaults: [!!python/name:os.system '']\n", 1),
    "custom tag": ("data/x.yaml", "path: !include canary\n", 1),
    "binary tag": ("data/x.yaml", "path: !!binary aGk=\n", 1),
}


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: str(case).replace(" ", "-"))
def test_a_recipe_that_is_more_than_data_is_refused_with_its_line(here: Path, case: str) -> None:
    name, content, line = HOSTILE[case]
    write(name, content)
    security = [error for error in check() if isinstance(error, SecurityError)]
    assert security, [str(error) for error in check()]
    assert security[0].exit_code == 9
    assert security[0].where == f"recipes/{name}:{line}"
    assert not (here / "canary").exists()


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


def test_a_header_below_a_comment_is_reported_because_hydra_ignores_it(here: Path) -> None:
    write("recipe/x.yaml", f"# my recipe\n{GLOBAL}name: x\n")
    assert any("no effect" in error.cause and error.where.endswith(":2") for error in check())


def test_all_problems_are_reported_in_one_go(here: Path) -> None:
    write("trainer/a.yaml", "lrr: 1\nsteps: x\nseed: 1\nseed: 2\n")
    write("data/b.yaml", f"pth: x\n{TARGET}\n")
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
    assert [str(error) for error in check("mine")] == []


@pytest.mark.parametrize("name", ["adapter/.x.yaml", "recipe/__pycache__/x.yaml"])
def test_files_that_hydra_could_find_are_checked_even_if_hidden(here: Path, name: str) -> None:
    write(name, f"{TARGET}\n")
    assert any(isinstance(error, SecurityError) for error in check())


def test_files_that_nothing_can_reach_are_left_alone(here: Path) -> None:
    write("README.md", "# mine\n")
    write(".git/x.yaml", f"{TARGET}\n")
    (here / "recipes" / ".#x.yaml").symlink_to("me@machine.1")
    assert check() == []


BOMB = (
    "architecture:\n  a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"  {new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
        for old, new in zip("abcdef", "bcdefg", strict=True)
    )
).encode()


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(100 * 1024 * 1024)


@pytest.mark.parametrize(
    "content",
    [BOMB, b"a: " + b"[" * 10_000, b"a: " + b"{a: " * 10_000, b"- " * 10_000, None],
    ids=["aliases", "brackets", "braces", "dashes", "100-MB"],
)
def test_a_bomb_is_refused_within_a_second_and_little_memory(
    here: Path, content: bytes | None
) -> None:
    path = write("model/x.yaml", content or b"")
    if content is None:
        sparse(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    expect_one(ConfigError, "recipes/model/x.yaml")
    assert time.process_time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_file_at_the_limit_of_size_is_read_in_bounded_time(here: Path) -> None:
    line = "  key{}: 1\n"
    text = "architecture:\n" + "".join(line.format(n) for n in range(20_000))
    write("model/x.yaml", text[: MAX_BYTES - 100].rpartition("\n")[0] + "\n")
    start = time.process_time()
    assert check() == []
    assert time.process_time() - start < 5


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
