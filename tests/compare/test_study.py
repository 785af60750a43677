"""The study's recipes are sound, and its page says what the comparisons say."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from report.planted import comparison
from support.command_line import CommandLine

from loratune import files
from loratune.compare.settings import named_settings
from loratune.config.convert import from_plain
from loratune.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "study" / "recipe"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study", ROOT / "scripts" / "study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_with_a_claim_names_contenders_that_exist(
    cli: CommandLine, study: ModuleType, tmp_path: Path
) -> None:
    assert len(study.names()) == len(list(RECIPES.glob("*.yaml"))) - 1  # one has what all share
    for folder in ("banking77", "e2e"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for part in ("train", "test"):
            rows = "".join(f"{part} {n}\n" for n in range(40))
            (tmp_path / "data" / folder / f"{part}.jsonl").write_text(rows)
    for name in study.names():
        words = study.command(name, "base", tmp_path, tmp_path / "results")[3:]
        found = cli(*words, "--cfg", "job")
        assert found.code == 0, found.text
        values = yaml.safe_load(found.out)
        recipe = {key: values[key] for key in values if key in RunConfig.__dataclass_fields__}
        config = from_plain(recipe, RunConfig)
        settings = named_settings(None, config)
        assert len(settings) == len(config.compare.contenders) >= 3
        folder = Path(str(config.data.path)).parent
        assert folder.name == ("e2e" if name == "variants_e2e" else "banking77")
        source = tmp_path / "data" / folder.name / "train.jsonl"
        sample, rows = Path(str(config.data.path)).read_text(), source.read_text()
        assert sample == study.shuffled(source, tmp_path / name).read_text() != rows
        assert sorted(sample.splitlines()) == sorted(rows.splitlines())


def test_the_page_says_what_was_found_and_what_was_not_run(
    study: ModuleType, tmp_path: Path
) -> None:
    found = comparison({"lora": 0.4, "vera": 0.6})
    (tmp_path / "scale").mkdir()
    files.write_json(tmp_path / "scale" / "comparison.json", found.to_dict())
    page = study.page(tmp_path)
    assert "## scale" in page and "## places" not in page
    assert "places" in page.partition("Not run: ")[2].partition("\n")[0]
    for claim in study.claims("scale"):
        assert claim.split(";")[0][:40] in page
    assert "0.4000" in page and "0.6000" in page


def test_seeds_that_order_otherwise_are_counted(study: ModuleType) -> None:
    whole = comparison({"lora": 0.4, "vera": 0.6})
    first, second = whole.variants
    losses = [(0.4, 0.6), (0.6, 0.5), (0.2, 0.7)]
    members = [
        [replace(run, loss=pair[side]) for run, pair in zip(one.members, losses, strict=True)]
        for side, one in enumerate(whole.variants)
    ]
    ordered = [replace(first, members=members[0]), replace(second, members=members[1])]
    assert study.ordered_otherwise(replace(whole, variants=ordered)) == (1, 3)


def test_an_unknown_name_runs_nothing(study: ModuleType) -> None:
    with pytest.raises(SystemExit, match="NAME: "):
        study.main(["base", "nosuch"])
    assert "study" not in sys.modules
