from __future__ import annotations

import os
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from loratune.cli.commands import generate
from loratune.config import overrides
from loratune.config.command_line import read_command_line
from loratune.config.recipes.folders import builtin_recipes, group_options, user_recipe_folders
from loratune.errors import ConfigError, LoratuneError, SecurityError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_overrides(words: list[str]) -> list[LoratuneError]:
    return overrides.check_overrides(read_command_line(words))


@pytest.mark.parametrize(
    "words",
    [
        ["adapter=vera", "trainer.lr=1e-3", "trainer.steps=200"],
        ["adapter=lora,vera", "trainer.lr=1e-3,1e-4", "-m"],
        ["-m", "adapter=glob(*)", "trainer.seed=range(0,3)", "trainer.lr=choice(0.1,0.2)"],
        ["recipe=null", "model.architecture={layers:2}", "data.columns.prompt=question"],
        ["targets.modules=[q_proj,v_proj]", "targets.modules=null", "stages=[train,merge]"],
        ["name=${model.path}-x", "out='a b, c'"],
        ["hydra.run.dir=${oc.env:HOME}/x", "hydra/launcher=joblib", "hydra.job.chdir=true", "-m"],
        ["trainer.steps=4", "--cfg", "job", "trainer.seed=3"],
        ["-sc", "install=bash"],
        ["data.path=???"],
    ],
    ids=" ".join,
)
def test_good_words_pass(words: list[str]) -> None:
    assert [str(error) for error in check_overrides(words)] == []


@pytest.mark.parametrize(
    "words",
    [
        ["+model._target_=os.system"],
        ["++a.b._target_=os.system"],
        ["data.columns={a:{_target_:os.system}}"],
        ["model.architecture={a:[{b:{_partial_:true}}]}"],
        ["targets.modules=[a,{_target_:os.system}]"],
        ["targets.modules=a,{_target_:os.system}", "-m"],
        ["hydra.callbacks.x._target_=os.system"],
        ["+hydra.callbacks={x:{_target_:pathlib.Path.touch}}"],
        ["hydra.launcher._target_=os.system"],
        ["+adapter@_target_=lora"],
        ["--experimental-rerun", "config.pickle"],
        ["--experimental-rerun=config.pickle"],
        ["--exp", "config.pickle"],
        ["model@hydra=demo"],
        ["+model@hydra.callbacks=demo"],
        ["name=${oc.env:HF_TOKEN}"],
        ["name='a ${oc.env:HF_TOKEN}'"],
        ["data.columns={a:'${oc.env:HF_TOKEN}'}"],
        ["name=${hydra:runtime.cwd}"],
        ["name=${hydra.job.name}"],
        ["recipe=../../x"],
        ["recipe=/etc/x"],
        ["recipe=.hidden/x"],
    ],
    ids=" ".join,
)
def test_words_that_are_more_than_data_are_refused(words: list[str]) -> None:
    errors = check_overrides(words)
    assert [type(error) for error in errors] == [SecurityError]
    assert errors[0].exit_code == 9


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("adapter.rnak=8", "'adapter.rnak' is not a setting; adapter.rnak; did you mean 'rank'?"),
        ("+trainer.lrr=1", "'trainer.lrr' is not a setting; trainer.lrr; did you mean 'lr'?"),
        ("++foo=1", "'foo' is not a setting"),
        ("trian.lr=1", "did you mean 'trainer'?"),
        ("lr=1", "did you mean 'trainer.lr'?"),
        ("adaptr=vera", "did you mean 'adapter'?"),
        ("adapter=vear", "no adapter named 'vear'; adapter=vear; did you mean 'vera'?"),
        ("recipe=dmeo", "did you mean 'demo'?"),
        ("adapter.rank=abc", "adapter.rank must be a whole number, got 'abc'"),
        ("trainer.steps=1.5", "trainer.steps must be a whole number or null, got '1.5'"),
        ("stages=[train,bad]", "stages must be a list, each one of train, evaluate"),
        ("trainer.batch_size=null", "trainer.batch_size must be a whole number"),
        ("trainer.lr=[", "cannot read 'trainer.lr=['; trainer.lr; close every bracket"),
        ("vera", "'vera' is not key=value; command line; write adapter=vera"),
        ("~trainer.lr", "'trainer.lr' cannot be deleted"),
        ("trainer.steps.x=1", "'trainer.steps.x' is not a setting"),
        ("model={path: x}", "model is chosen by name"),
        ("hydra.searchpath=[/tmp]", "--config-dir"),
        ("--config-name=../x", "recipe=NAME"),
        ("--config-path=/tmp", "--config-dir"),
        ("adapter=null", "adapter cannot be left out"),
        ("launch={nproc: 1, nprocs: 2}", "'launch.nprocs' is not a setting"),
    ],
)
def test_a_wrong_word_is_one_line_that_helps(word: str, said: str) -> None:
    errors = check_overrides([word])
    assert [type(error) for error in errors] == [ConfigError]
    assert said in str(errors[0])
    assert len(errors[0].lines()) == 1
    assert "use +" not in str(errors[0])


@pytest.mark.parametrize("word", ["true", "False", "2e5", "3_000", "2024_07", "nan", "-7.50", "no"])
@pytest.mark.parametrize("key", ["name", "data.template", "data.columns.prompt", "prompt"])
def test_a_word_for_a_text_is_the_word_typed(key: str, word: str) -> None:
    line = read_command_line([f"{key}={word}"], generate.Config)
    assert overrides.check_overrides(line, generate.Config) == []
    assert [one.value() for one in line.overrides] == [word]
    assert read_command_line(line.for_hydra(generate.Config)).overrides[0].value() == word


def test_the_words_of_a_sweep_over_a_text_are_those_typed() -> None:
    (swept,) = read_command_line(["name=true,5e1,x", "-m"]).overrides
    assert [str(item) for item in swept.sweep_string_iterator()] == ['"true"', '"5e1"', "x"]


@pytest.mark.parametrize(
    "word",
    ["trainer.steps='5'", 'trainer.lr="2e-4"', "trainer.steps=true", "trainer.betas=['0.9',0.99]"],
)
def test_a_text_or_a_truth_value_is_not_a_number(word: str) -> None:
    (error,) = check_overrides([word])
    assert error.exit_code == 2 and "number" in str(error)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("Où est le port ?", "'ù'"),
        ("one#two", "'#'"),
        ("first\nsecond", "a line break"),
        ("2 = 2", "'='"),
        ("sure (or not)", "'('"),
        ("tea\u00a0time", "a no-break space"),
    ],
)
def test_the_character_that_needs_quotes_is_named_and_the_form_shown(
    value: str, named: str
) -> None:
    (error,) = check_overrides([f"name={value}"])
    assert f"{named} needs quotes" in error.cause
    form = shlex.split(error.fix.removeprefix("type "))[0]
    if value.isprintable():
        assert read_command_line([form]).overrides[0].value() == value
    else:
        assert form == 'name="..."'


def test_a_key_of_another_variant_is_said_to_have_no_effect() -> None:
    (error,) = check_overrides(["adapter=vera", "adapter.lr_ratio=8"])
    assert "no effect" in error.cause
    assert "lora_plus" in error.fix
    assert check_overrides(["adapter=lora_plus", "adapter.lr_ratio=8"]) == []


def test_all_wrong_words_are_reported_in_one_go() -> None:
    errors = check_overrides(["adapter=vear", "trainer.lrr=1", "data.limit=x", "name=["])
    assert len(errors) == 4


def test_unknown_flags_are_one_line() -> None:
    with pytest.raises(ConfigError, match="--bogus") as caught:
        read_command_line(["--bogus"])
    assert len(caught.value.lines()) == 1


def test_a_secret_in_a_wrong_word_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "CANARYTOK123")
    words = ["trainer.steps=CANARYTOK123", "data.path=[CANARYTOK123", "logger.api_key=OTHERTOK=["]
    text = "\n".join(str(error) for error in check_overrides(words))
    assert "CANARYTOK123" not in text
    assert "OTHERTOK" not in text


def test_deeply_nested_words_are_refused_not_crashed_on() -> None:
    (error,) = check_overrides(["trainer.lr=" + "[" * 15_000])
    assert error.exit_code == 2


def test_words_are_prepared_so_that_hydra_takes_them() -> None:
    words = ["-m", "data.columns.prompt=q", "+trainer.steps=4", "--config-dir", "x", "adapter=vera"]
    Path("x").mkdir()
    assert read_command_line(words).for_hydra() == [
        "++data.columns.prompt=q",
        "trainer.steps=4",
        "adapter=vera",
        "-m",
        "--config-dir",
        "x",
    ]


def test_user_folders_are_config_dir_then_recipes() -> None:
    assert user_recipe_folders() == []
    Path("recipes").mkdir()
    Path("more").mkdir()
    assert user_recipe_folders() == [Path("recipes")]
    assert user_recipe_folders("more") == [Path("more"), Path("recipes")]
    with pytest.raises(ConfigError, match="no such folder"):
        user_recipe_folders("none")
    line = read_command_line(["a=1", "-cd", "more"])
    assert line.folders == (Path("more"), Path("recipes"))


def test_the_package_own_folder_is_not_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(builtin_recipes().parent)
    assert user_recipe_folders() == []


def test_options_of_a_group_join_the_users_and_the_packages() -> None:
    path = Path("recipes/adapter/mine.yaml")
    path.parent.mkdir(parents=True)
    path.write_text("rank: 1\n")
    options = group_options("adapter", [Path("recipes")])
    assert {"mine", "lora", "vera"} <= set(options)


def test_the_words_are_read_once_and_tell_everything_that_commands_ask() -> None:
    words = ["trainer.seed=1,2", "-m", "+data.columns.q=x", "hydra.job.name=y", "recipe=demo"]
    line = read_command_line(words)
    assert [str(one.input_line) for one in line.settings] == [words[0], words[2], words[4]]
    assert line.flag_words == ("-m",) and line.flags.multirun
    assert line.keys == {"trainer.seed", "data.columns.q", "hydra.job.name", "recipe"}
    assert line.recipe == "demo"
    assert read_command_line(["recipe=null"]).recipe is None
    job = line.job(["trainer.seed=2", "recipe=e2e"])
    assert (job.keys, job.recipe) == ({"trainer.seed", "recipe"}, "e2e")
    assert job.settings[0].value() == 2


APP = dedent(
    """
    import os, sys
    import hydra
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf
    from loratune.config.composition import check_composed, translate_composition_error
    from loratune.config.convert import register_schemas
    from loratune.config.command_line import read_command_line
    from loratune.config.overrides import check_overrides
    from loratune.config.recipes.files import check_recipe_files
    from loratune.config.schema import RunConfig
    from loratune.config.recipes.folders import *
    from loratune.errors import LoratuneError, raise_together

    os.environ["HYDRA_FULL_ERROR"] = "1"
    words = sys.argv[1:]
    checked = os.environ.get("UNCHECKED") != "1"
    raised = []  # Hydra prints its own line about whatever leaves a task
    def task(config):
        errors = check_composed(config)
        raised.extend(errors)
        if not errors:
            print(OmegaConf.to_yaml(config, resolve=True))
    try:
        line = read_command_line(words)
        folders = line.folders
        if checked:
            raise_together([*check_recipe_files(folders), *check_overrides(line)])
            sys.argv[1:] = line.for_hydra()
        register_user_recipes(folders)
        register_schemas(RunConfig)
        ConfigStore.instance().store("loratune", {"template": ""}, group="hydra/help")
        hydra.main(version_base="1.3", config_path=str(builtin_recipes()), config_name="config")(
            task)()
        raise_together(raised)
    except Exception as error:
        told = translate_composition_error(error)
        print(told, file=sys.stderr)
        sys.exit(told.exit_code)
    """
)


def app(*words: str, unchecked: bool = False) -> subprocess.CompletedProcess[str]:
    Path("app.py").write_text(APP)
    environment = {**os.environ, "UNCHECKED": "1" if unchecked else "0"}
    source = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([source, environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "app.py", *words],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip


def recipe(name: str, text: str) -> None:
    path = Path("recipes") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text))


def test_the_users_recipes_shadow_the_packages() -> None:
    recipe("adapter/lora.yaml", "defaults: [/schema/adapter/lora@_here_, _self_]\nrank: 77\n")
    recipe("recipe/mine.yaml", "# @package _global_\nname: mine\n")
    done = app("recipe=mine", "adapter=lora", "model.path=x", "data.path=y")
    assert done.returncode == 0, done.stderr
    assert "rank: 77" in done.stdout
    assert "name: mine" in done.stdout


def test_config_dir_goes_before_recipes() -> None:
    for folder, rank in [("recipes", 1), ("more", 2)]:
        path = Path(folder) / "adapter" / "lora.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(f"defaults: [/schema/adapter/lora@_here_, _self_]\nrank: {rank}\n")
    done = app("recipe=demo", "--config-dir", "more")
    assert done.returncode == 0, done.stderr
    assert "rank: 2" in done.stdout


def test_a_column_can_be_named_without_a_plus() -> None:
    done = app("recipe=demo", "-m", "data.columns.prompt=question", "trainer.seed=1,2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("prompt: question") == 2


def test_hydra_settings_in_a_recipe_never_act() -> None:
    canary = """\
        # @package _global_
        hydra:
          run: {dir: canary}
    """
    recipe("recipe/evil.yaml", canary)
    assert app("recipe=evil", "model.path=x", "data.path=y", unchecked=True).returncode == 0
    assert Path("canary").is_dir()  # bare Hydra acts on the recipe
    shutil.rmtree("canary")
    done = app("recipe=evil", "model.path=x", "data.path=y")
    assert done.returncode == 9
    assert "recipes/recipe/evil.yaml:2" in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("canary").exists()


class Touch:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("canary"),)  # type: ignore[return-value]


def test_a_rerun_pickle_is_not_loaded() -> None:
    Path("config.pickle").write_bytes(pickle.dumps(Touch()))
    done = app("--experimental-re", "config.pickle")
    assert done.returncode == 9
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe=null", "data.path=???"], ["'data.path' must be set"]),
        (
            ["recipe=demo", "name=${nothing.here}"],
            ["'${nothing.here}' refers to a setting that does not exist; name"],
        ),
        (
            ["recipe=null", "data.path=???", "model.path=???", "name=${a.b}", "out=${c}"],
            ["'data.path'", "'model.path'", "'${a.b}'", "'${c}'"],
        ),
        (["recipe=demo", "adapter.lr_ratio=3"], ["no effect", "lora_plus"]),
        (["recipe=demo", "trainer.steps=1,2"], ["trainer.steps=1,2", "-m"]),
    ],
)
def test_what_composition_finds_is_one_line_each(words: list[str], said: list[str]) -> None:
    done = app(*words)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "use +" not in done.stderr
    for text in said:
        assert text in done.stderr
    assert all(line.startswith("error[2]") for line in done.stderr.splitlines())
