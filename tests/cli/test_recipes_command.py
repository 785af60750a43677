"""``loratune recipes``: found, shown and copied without overwriting anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratune.config.recipes.catalog import summary_of
from loratune.config.recipes.folders import builtin_recipes


def test_ls_names_every_group_and_file_with_what_it_says_about_itself(cli):
    code, out, _ = cli("recipes")
    assert code == 0
    for path in builtin_recipes().glob("*/*.yaml"):
        assert f"  {path.stem} " in out
    assert "E2E NLG: restaurant facts in" in out
    assert "(yours)" not in out


def test_a_summary_is_the_first_sentence_that_is_no_command():
    text = (
        "# @package _global_\n# loratune train recipe=x\n# One thing. Another\n# thing.\nname: x\n"
    )
    assert summary_of(text) == "One thing."
    assert summary_of("rank: 8 # width\n# later\n") == ""


def test_show_prints_the_file_under_its_path(cli):
    path = builtin_recipes() / "adapter" / "vera.yaml"
    code, out, _ = cli("recipes", "show", "vera")
    assert code == 0
    assert out == f"# {path}\n\n{path.read_text(encoding='utf-8')}"


def test_a_copied_recipe_keeps_its_comments_and_is_used(cli, composed):
    code, out, _ = cli("recipes", "copy", "smoke", "as=mine")
    assert (code, out.splitlines()[0]) == (0, "wrote recipes/recipe/mine.yaml")
    text = Path("recipes/recipe/mine.yaml").read_text(encoding="utf-8")
    assert "# loratune train recipe=mine " in text and "# Ten steps" in text
    changed = text.replace("lr_scale: 10", "lr_scale: 7")
    Path("recipes/recipe/mine.yaml").write_text(changed, encoding="utf-8")
    config = composed("recipe=mine")
    assert (config.name, config.trainer.lr_scale, config.trainer.steps) == ("mine", 7, 10)
    assert "(yours)" in cli("recipes", "ls", "recipe").out


def test_copy_overwrites_only_when_told(cli):
    cli("recipes", "copy", "adapter/vera")
    own = Path("recipes/adapter/vera.yaml")
    own.write_text("defaults: [/schema/adapter/vera@_here_, _self_]\nrank: 3\n", encoding="utf-8")
    code, _, err = cli("recipes", "copy", "adapter/vera")
    assert code == 8 and "add force=true" in err
    assert "rank: 3" in own.read_text(encoding="utf-8")
    # What is copied is what is used: here the user's own file, onto itself.
    cli.succeeds("recipes", "copy", "adapter/vera", "force=true")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "dmeo"], "did you mean 'demo'?"),
        (["show"], "which recipe?"),
        (["sohw", "demo"], "did you mean 'show'?"),
        (["ls", "adaptr"], "did you mean 'adapter'?"),
        (["copy", "demo", "frce=true"], "did you mean 'force'?"),
        (["copy", "demo", "as=../x"], "'../x' is not a name"),
        (["copy", "../config"], "is not a group"),
        (["copy", "demo", "force=maybe"], "true or false"),
    ],
    ids=str,
)
def test_bad_words_get_one_line_and_exit_code_2(words, said, cli):
    code, _, err = cli("recipes", *words)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert not Path("recipes").exists()


def test_the_packages_own_folder_is_never_written(cli, monkeypatch):
    monkeypatch.chdir(builtin_recipes().parent)
    code, _, err = cli("recipes", "copy", "demo", "as=another")
    assert code == 2 and "the package's own" in err
