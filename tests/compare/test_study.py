"""The study's recipes are sound, and its page says what the comparisons say."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import yaml
from report.planted import comparison
from support.command_line import CommandLine

from loratune import files
from loratune.compare.result import Comparison, Twin
from loratune.compare.settings import named_settings
from loratune.config.convert import from_plain
from loratune.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "study" / "recipe"


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("study")
        for name in ("study", "study_claims", "study_rewind"):
            patch.delitem(sys.modules, name)


def test_every_recipe_with_a_claim_names_contenders_that_exist(
    cli: CommandLine, study: ModuleType, tmp_path: Path
) -> None:
    assert len(study.names()) == len(list(RECIPES.glob("*.yaml"))) - 1  # one has what all share
    (tmp_path / "data" / "wikitext2").mkdir(parents=True)
    texts = "".join(f"text {n}\n" for n in range(40))
    (tmp_path / "data" / "wikitext2" / "heldout.jsonl").write_text(texts)
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
        heldout = Path(str(config.compare.heldout_path)).read_text().splitlines()
        assert len(heldout) == study.HELDOUT_TEXTS and set(heldout) <= set(texts.splitlines())
        folder = Path(str(config.data.path)).parent
        assert folder.name == ("e2e" if name == "variants_e2e" else "banking77")
        source = tmp_path / "data" / folder.name / "train.jsonl"
        sample, rows = Path(str(config.data.path)).read_text(), source.read_text()
        assert sample == study.shuffled(source, tmp_path / name).read_text() != rows
        assert sorted(sample.splitlines()) == sorted(rows.splitlines())


def test_the_page_says_what_was_found_and_what_was_not_run(
    study: ModuleType, tmp_path: Path
) -> None:
    found = comparison({"rs64": 0.4, "plain64": 0.6}, text="/home/me/rows.jsonl")
    (tmp_path / "scale").mkdir()
    files.write_json(tmp_path / "scale" / "comparison.json", found.to_dict())
    page = study.page(tmp_path, tmp_path / "docs")
    assert "## scale" in page and "## places" not in page
    assert "places" in page.partition("Not run: ")[2].partition("\n")[0]
    for claim in study.claims("scale").values():
        assert claim in page
    assert "0.4000" in page and "0.6000" in page and "refuted" in page
    for figure in (tmp_path / "docs").glob("*.svg"):
        assert f"(docs/{figure.name})" in page
        ElementTree.parse(figure)
    text = (tmp_path / "docs" / "scale.json").read_text()
    raw = json.loads(text)
    assert "/home/me" not in text and raw["variants"] and found.samples
    assert raw["samples"] == raw["provenance"]["command"] == []


def test_the_first_of_each_aim_is_shown_beside_what_it_reached(study: ModuleType) -> None:
    found = comparison({"lora": 0.4, "vera": 0.6})
    lora, vera = found.variants
    lighter = vera.estimates["loss"].__class__(mean=1e6, low=None, high=None, seeds=2)
    heavier = replace(lighter, mean=2e6)
    measured = [
        replace(lora, estimates=lora.estimates | {"peak_bytes": heavier}),
        replace(vera, estimates=vera.estimates | {"peak_bytes": lighter}),
    ]
    rows = {row[0]: row[1:] for row in study.aims_table(replace(found, variants=measured)).rows}
    assert rows["the lowest loss"][:3] == ("lora", "0.4", "vera 0.6")
    assert rows["the least memory"][:3] == ("vera", "1 MB", "lora 2 MB")
    assert rows["the least memory"][3].startswith("0.6")


def test_how_far_seconds_of_the_same_work_lie_apart_is_told(study: ModuleType) -> None:
    seconds = [{"step_seconds": 1.0}, {"step_seconds": 1.2}, {"step_seconds": 0.8}]
    twice = [{"step_seconds": 2.0}, {"step_seconds": 2.1}, {"step_seconds": 2.2}]
    found = with_runs({"lora": 0.4, "vera": 0.6}, {"lora": seconds, "vera": twice})
    [sentence] = study.noise_in_seconds(found)
    assert "up to 1.50 times (lora)" in sentence
    one = [replace(v, members=v.members[:1]) for v in found.variants]
    assert study.noise_in_seconds(replace(found, variants=one)) == []


def test_the_main_comparison_comes_first_and_one_trainings_names_last(
    study: ModuleType, tmp_path: Path
) -> None:
    assert (study.names()[0], study.names()[-1]) == (study.MAIN, study.IDENTITIES)
    found = comparison({"rs64": 0.4, "alpha512": 0.4})
    text = study.section(study.IDENTITIES, found, tmp_path / "docs")
    assert "verdicts" in text and "Choose" not in text and ".svg" not in text
    assert "Choose" in study.section("scale", comparison({"rs64": 0.4, "plain64": 0.6}), tmp_path)


def test_every_claim_has_a_test_and_every_test_a_claim(study: ModuleType) -> None:
    claimed = {claim for name in study.names() for claim in study.claims(name)}
    assert claimed == study.TESTS.keys()
    on_banking77, on_e2e = study.claims("variants_banking77"), study.claims("variants_e2e")
    assert on_banking77 == on_e2e | {"forgets_less": on_banking77["forgets_less"]} != on_e2e


def pairs(losses: dict[str, float], equivalent: bool = False) -> Comparison:
    """A comparison whose every difference is told, or is none, within 0.01 nats."""
    found = comparison(losses)
    differences = [
        replace(one, equivalent=equivalent, margin=0.04, low=one.difference - 0.01,
                high=one.difference + 0.01)
        for one in found.differences
    ]  # fmt: skip
    recipe = {**found.recipe, "compare": {"lr_factor": 3.0}}
    return replace(found, differences=differences, recipe=recipe)


def with_runs(
    losses: dict[str, float], numbers: Mapping[str, list[dict[str, float]]]
) -> Comparison:
    found = pairs(losses)
    variants = [
        replace(one, members=[replace(run, **values) for run, values in zip(
            one.members, numbers[one.label], strict=True)])
        for one in found.variants
    ]  # fmt: skip
    return replace(found, variants=variants)


def with_rates(losses: dict[str, float], rates: Mapping[str, float]) -> Comparison:
    found = pairs(losses)
    variants = [replace(one, lr=rates[one.label]) for one in found.variants]
    return replace(found, variants=variants)


def with_ranks(scale: Callable[[int], float], rates: Mapping[int, float]) -> Comparison:
    found = comparison({f"r{rank}": 0.4 for rank in rates})
    variants = [
        replace(one, lr=rate, variant="lora",
                adapter={"rank": rank, "alpha": scale(rank) * rank})
        for one, (rank, rate) in zip(found.variants, rates.items(), strict=True)
    ]  # fmt: skip
    recipe = {**found.recipe, "compare": {"lr_factor": 3.0}}
    return replace(found, variants=variants, recipe=recipe)


def steps(*numbers: float) -> list[dict[str, float]]:
    return [{"steps_to_target": number} for number in numbers]


def forgotten(*numbers: float) -> list[dict[str, float]]:
    return [{"forgetting_at_target": number} for number in numbers]


def with_numbers(found: Comparison, trainable: Mapping[str, int]) -> Comparison:
    variants = [
        replace(one, costs=replace(one.costs, trainable=trainable[one.label]))
        for one in found.variants
    ]
    return replace(found, variants=variants)


FULL_LORA = {"full": 0.4, "lora": 0.41}
PLUS = {"lora": 0.4, "lora_plus": 0.4}
VERA = {"lora": 0.4, "vera": 0.6}
TENTH, HALF = {"lora": 1000, "vera": 100}, {"lora": 1000, "vera": 500}
ALL_LAYERS = {"mlp": 0.4, "everywhere": 0.2}


@pytest.mark.parametrize(
    ("claim", "found", "word"),
    [
        ("within_two_percent", pairs(FULL_LORA), "confirmed"),  # of a gain of 3.85
        ("within_two_percent", pairs({"full": 0.4, "lora": 0.6}), "refuted"),
        ("within_two_percent", pairs({"full": 0.4, "lora": 0.47}), "undecided"),
        ("rate_ten_times", with_rates(FULL_LORA, {"full": 2e-4, "lora": 1.8e-3}), "confirmed"),
        ("rate_ten_times", with_rates(FULL_LORA, {"full": 2e-4, "lora": 5.4e-3}), "undecided"),
        ("rate_ten_times", with_rates(FULL_LORA, {"full": 2e-4, "lora": 2e-4}), "refuted"),
        (
            "half_the_steps",
            with_runs(PLUS, {"lora": steps(40, 42, 41), "lora_plus": steps(15, 15, 16)}),
            "confirmed",
        ),
        (
            "half_the_steps",
            with_runs(PLUS, {"lora": steps(40, 42, 41), "lora_plus": steps(29, 29, 30)}),
            "refuted",
        ),
        (
            "half_the_steps",
            with_runs(PLUS, {"lora": steps(40, 42, 41), "lora_plus": steps(10, 25, 30)}),
            "undecided",
        ),
        (
            "fifth_fewer_steps",
            with_runs(
                {"lora": 0.4, "lora_fa": 0.4},
                {"lora": steps(40, 42, 41), "lora_fa": steps(30, 31, 30)},
            ),
            "confirmed",
        ),
        (
            "forgets_less",
            with_runs(
                FULL_LORA, {"full": forgotten(0.5, 0.5, 0.6), "lora": forgotten(0.1, 0.1, 0.2)}
            ),
            "confirmed",
        ),
        (
            "forgets_less",
            with_runs(
                FULL_LORA, {"full": forgotten(0.1, 0.1, 0.2), "lora": forgotten(0.5, 0.5, 0.6)}
            ),
            "refuted",
        ),
        (
            "forgets_less",
            with_runs(
                FULL_LORA, {"full": forgotten(0.1, 0.5, 0.6), "lora": forgotten(0.5, 0.1, 0.6)}
            ),
            "undecided",
        ),
        (
            "tenth_of_the_numbers",
            with_numbers(pairs({"lora": 0.4, "vera": 0.41}, equivalent=True), TENTH),
            "confirmed",
        ),
        (
            "tenth_of_the_numbers",
            with_numbers(pairs({"lora": 0.4, "vera": 0.41}, equivalent=True), HALF),
            "undecided",
        ),
        ("tenth_of_the_numbers", with_numbers(pairs(VERA), TENTH), "refuted"),
        ("same_at_own_rates", pairs({"rs64": 0.4, "plain64": 0.41}, equivalent=True), "confirmed"),
        ("same_at_own_rates", pairs({"rs64": 0.4, "plain64": 0.41}), "confirmed"),
        ("same_at_own_rates", pairs({"rs64": 0.365, "plain64": 0.4}), "undecided"),
        ("same_at_own_rates", pairs({"rs64": 0.2, "plain64": 0.4}), "refuted"),
        (
            "better_at_one_rate",
            pairs({"rs64_as_published": 0.4, "plain64_as_published": 0.6}),
            "confirmed",
        ),
        (
            "better_at_one_rate",
            pairs({"rs64_as_published": 0.6, "plain64_as_published": 0.4}),
            "refuted",
        ),
        ("mlp_beats_attention", pairs({"attention": 0.6, "mlp": 0.4}), "confirmed"),
        ("mlp_beats_attention", pairs({"attention": 0.4, "mlp": 0.41}), "undecided"),
        ("attention_adds_nothing", pairs(ALL_LAYERS), "refuted"),
        ("attention_adds_nothing", pairs({"mlp": 0.4, "everywhere": 0.6}), "confirmed"),
        ("attention_adds_nothing", pairs({"mlp": 0.4, "everywhere": 0.365}), "undecided"),
        (
            "attention_adds_nothing",
            pairs({"mlp": 0.4, "everywhere": 0.4}, equivalent=True),
            "confirmed",
        ),
        (
            "one_rate_by_rank",
            with_ranks(lambda rank: 32 / rank, {1: 1e-3, 64: 3e-3}),
            "confirmed",
        ),
        (
            "one_rate_by_rank",
            with_ranks(lambda rank: 32 / rank, {1: 1e-3, 64: 9e-3}),
            "refuted",
        ),
        (
            "one_rate_by_root",
            with_ranks(lambda rank: 8 / rank**0.5, {1: 1e-3, 64: 9e-3}),
            "refuted",
        ),
        (
            "rate_falls_with_rank",
            with_ranks(lambda rank: 1.0, {1: 9e-3, 16: 3e-3, 64: 3e-3}),
            "confirmed",
        ),
        (
            "rate_falls_with_rank",
            with_ranks(lambda rank: 1.0, {1: 3e-3, 16: 3e-3, 64: 3e-3}),
            "refuted",
        ),
    ],
)
def test_a_claim_is_judged_by_its_numbers(
    study: ModuleType, claim: str, found: Comparison, word: str
) -> None:
    assert study.TESTS[claim](found).word == word


def test_who_lies_beyond_two_percent_is_named_and_nobody_else(study: ModuleType) -> None:
    found = pairs({"full": 0.4, "lora": 0.9, "dora": 0.41})
    assert study.TESTS["within_two_percent"](found).evidence.endswith(" Beyond 2 %: lora.")


def test_a_scale_is_what_the_variant_makes_of_its_settings(study: ModuleType) -> None:
    found = with_ranks(lambda rank: 8 / rank**0.5, {1: 9e-3, 4: 3e-3, 64: 1e-3})
    one, four, many = found.variants
    follows = replace(one, adapter={"rank": 1, "alpha": None})  # alpha is the rank: scale 1
    root = replace(many, adapter={"rank": 64, "alpha": 8.0, "rslora": True})  # 8/√64
    judged = study.TESTS["rate_falls_with_rank"](replace(found, variants=[follows, four, root]))
    assert judged.word == "confirmed"
    assert "Best rates: rank 1 0.009, rank 64 0.001;" in judged.evidence


def test_a_difference_is_turned_to_the_claim_s_way_round(study: ModuleType) -> None:
    found = pairs({"plain64_as_published": 0.4, "rs64_as_published": 0.6})
    evidence = study.TESTS["better_at_one_rate"](found).evidence
    assert "rs64_as_published - plain64_as_published: +0.2000" in evidence
    assert evidence.endswith("(+0.1900 to +0.2100), significant.")


@pytest.mark.parametrize(
    ("equivalent", "words"),
    [
        (True, "not significant; equivalent within 0.0400."),
        (False, "not significant; not shown to be equivalent within 0.0400."),
    ],
)
def test_a_difference_that_is_not_significant_is_equivalent_or_not_shown_to_be(
    study: ModuleType, equivalent: bool, words: str
) -> None:
    found = pairs({"dora": 0.4, "lora": 0.41}, equivalent=equivalent)
    assert study.TESTS["dora_beats_lora"](found).evidence.endswith(words)


@pytest.mark.parametrize(("apart", "word"), [(1e-6, "confirmed"), (1e-3, "refuted")])
def test_names_of_one_training_are_told_by_every_seed(
    study: ModuleType, apart: float, word: str
) -> None:
    names = {"a": 0.4, "b": 0.4}
    losses = {"a": [{"loss": 0.4}] * 3, "b": [{"loss": 0.4}, {"loss": 0.4 + apart}, {"loss": 0.4}]}
    found = replace(with_runs(names, losses), twins=[Twin(label="b", of="a", rate_factor=1.0)])
    assert study.TESTS["differ_by_rounding"](found).word == word


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


def test_help_is_printed_and_nothing_runs(study: ModuleType, capsys) -> None:
    study.main(["--help"])
    assert "NAME: " in capsys.readouterr().out


def test_what_rewinding_gives_back_is_read_from_the_sweep(
    cli: CommandLine, study: ModuleType, tmp_path: Path
) -> None:
    recipe = ("recipe=smoke", "trainer.steps=12", "evaluate.retention=[builtin:heldout]")
    out = tmp_path / "lora"
    cli.succeeds("train", *recipe, "stages=[train]", f"out={out}")
    cli.succeeds("rewind", f"run={out}", "scales=[0,0.5,1]", "keep=0.4")
    section = study.study_rewind.section(tmp_path)
    assert "### lora" in section and "### full" not in section
    base, half, whole = (
        point["dev"]["loss"]
        for point in json.loads((out / "rewound" / "rewind.json").read_text())["points"]
    )
    kept = (base - half) / (base - whole)
    assert f"Scale 0.5 keeps {kept:.1%} of a gain" in section and "| **0.5** |" in section
    assert not study.study_rewind.section(tmp_path / "nothing")


def test_the_runs_to_rewind_are_composed(
    cli: CommandLine, study: ModuleType, tmp_path: Path
) -> None:
    rows = ["model.path=base", "data.path=rows", "compare.heldout_path=texts"]
    for label in study.study_rewind.LABELS:
        train, rewind = study.study_rewind.commands(label, study.RECIPES, rows, 3e-4, tmp_path)
        found = cli(*train[3:], "--cfg", "job")
        assert found.code == 0, found.text
        values = yaml.safe_load(found.out)
        assert values["adapter"]["variant"] == label and values["trainer"]["lr"] == 3e-4
        assert values["evaluate"]["retention"] == ["texts"] and rewind[3:] == [
            "rewind",
            f"run={tmp_path}",
        ]


def test_readme_shows_the_main_comparison_between_its_marks(study: ModuleType) -> None:
    found = pairs({"full": 0.4, "lora": 0.5, "lora_fa": 0.5, "vera": 0.6})
    labels = [*found.variants, *(replace(found.variants[1], label=label) for label in
              ("lora_plus", "dora", "pissa"))]  # fmt: skip
    found = replace(found, variants=[replace(one, lr=1e-3) for one in labels])
    before = "# A\n<!-- study:begin -->\nold\n<!-- study:end -->\nz\n"
    text = study.with_main_table(before, found)
    assert text.startswith("# A\n<!-- study:begin -->\n") and text.endswith(
        "<!-- study:end -->\nz\n"
    )
    assert "old" not in text and "| **full** |" in text and "(base)" in text
    for claim in study.claims("variants_banking77").values():
        assert claim in text
    assert study.with_main_table(text, found) == text


def test_what_cannot_run_is_one_line_and_the_command_s_own_exit_code(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORATUNE_SHARED", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^no rows in .*; name their folder as LORATUNE_SHARED"):
        study.main(["base"])
    with pytest.raises(SystemExit, match=r"^no best rates to train at: run nothing first"):
        list(study.study_rewind.open_commands(study.RECIPES, [], tmp_path / "nothing", tmp_path))
    with pytest.raises(SystemExit) as ended:
        study.perform([sys.executable, "-c", "raise SystemExit(3)"])
    assert ended.value.code == 3
    study.perform([sys.executable, "-c", ""])
