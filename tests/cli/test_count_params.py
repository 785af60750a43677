"""``loratune count-params`` as it is typed."""

from __future__ import annotations

import csv
import io
import json

import pytest

from loratune.adapters.registry import variant_names

PRINTED = {"opt_125m": 589_824, "opt_350m": 1_572_864, "opt_1_3b": 3_145_728}


def counted(cli, *words: str) -> dict:
    code, out, err = cli("count-params", *words, "format=json")
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.mark.parametrize(("model", "lora"), PRINTED.items())
def test_lora_on_query_and_value_at_rank_16_has_the_number_the_opt_tables_print(model, lora, cli):
    report = counted(cli, f"model={model}", "targets=attention_qv", "rank=16")
    trainable = {row["variant"]: row["trainable"] for row in report["variants"]}
    assert trainable["lora"] == trainable["lora_plus"] == lora
    assert trainable["lora_fa"] == lora // 2  # B alone, the honest row


def test_the_printed_lora_fa_number_belongs_to_four_modules(cli):
    words = ("model=opt_125m", "targets=attention", "rank=16", "variants=[lora_fa]")
    [row] = counted(cli, *words)["variants"]
    assert row["trainable"] == PRINTED["opt_125m"]


def test_the_table_names_its_denominators_and_counts_shared_matrices_once(cli):
    code, out, _ = cli("count-params", "model=opt_125m", "targets=attention_qv", "rank=16")
    assert code == 0
    assert "589,824" in out and "294,912" in out
    assert "trainable / 125,239,296 (base parameters" in out
    assert "vera: 24,576 frozen numbers are random matrices that all 24 layers share" in out
    assert "vera at rank 16: its own recipe uses 256" in out
    for variant in variant_names():
        assert f"│ {variant} " in out


def test_a_narrow_terminal_gets_every_number_with_variants_as_columns(cli, monkeypatch):
    from loratune.console import console

    console.cache_clear()
    monkeypatch.setenv("COLUMNS", "85")
    four = "variants=[lora,lora_fa,lora_plus,vera]"
    _, out, _ = cli("count-params", "model=llama_3_8b", "rank=64", four)
    console.cache_clear()
    assert "lora_plus" in out and "% of base + adapter" in out
    assert "1,342,177,280" in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("- ")) <= 85


def test_csv_is_a_table_a_program_reads(cli):
    _, out, _ = cli("count-params", "model=gpt2", "rank=4", "format=csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert {row["variant"] for row in rows} == set(variant_names())
    assert all(int(row["stored bytes"]) == 4 * int(row["stored"]) for row in rows)


def test_markdown_has_one_row_a_variant_and_the_notes_below(cli):
    _, out, _ = cli("count-params", "model=gpt2", "rank=4", "format=md", "variants=[lora]")
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("| lora |")]
    assert [line for line in lines if line.startswith("- % of base:")]


def test_modules_sum_to_the_variants_total(cli):
    report = counted(cli, "model=gpt2", "per_module=true", "adapter.rank=6")
    for row in report["variants"]:
        assert sum(module["trainable"] for module in row["modules"]) == row["trainable"]
        own = sum(module["frozen"] for module in row["modules"])
        assert own + row["shared"] == row["frozen"]


def test_a_rank_set_for_the_chosen_variant_counts_for_those_of_the_same_usual_rank(cli):
    rows = counted(cli, "model=gpt2", "adapter.rank=6")["variants"]
    ranks = {row["variant"]: row["rank"] for row in rows}
    assert {**ranks, "lora": 6, "lora_fa": 6, "lora_plus": 6, "dora": 6, "vera": 256} == ranks


def test_a_budget_gives_the_highest_rank_that_keeps_it(cli):
    words = ("model=opt_125m", "targets=attention_qv")
    report = counted(cli, *words, "match=trainable:589824")
    ranks = {match["variant"]: match["rank"] for match in report["matches"]}
    assert (ranks["lora"], ranks["lora_fa"]) == (16, 32)
    for row, match in zip(report["variants"], report["matches"], strict=True):
        assert row["trainable"] == match["reached"]
        assert (match["reached"] <= 589_824) is (match["rank"] is not None)
    assert [match["variant"] for match in report["matches"] if match["rank"] is None] == ["full"]


def test_a_recipe_is_counted_with_its_own_model_and_without_its_data(cli):
    report = counted(cli, "recipe=e2e", "variants=lora")
    assert report["base_parameters"] == 125_239_296
    assert report["layers"] == 24


def test_another_path_does_not_keep_the_numbers_of_the_group_it_came_from(cli):
    code, _, err = cli("count-params", "model.path=nobody/has-this-model")
    assert code == 4
    assert "nobody/has-this-model" in err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["variants=[lroa]"], 2, "did you mean 'lora'?"),
        (["match=foo"], 2, "'foo' is not a budget"),
        (["match=trainable:9", "rank=4"], 2, "exclude each other"),
        (["rank=0"], 2, "0 is too small"),
        (["format=xml"], 2, "format must be one of table, md, csv, json"),
        (["targets=nope"], 2, "no targets named 'nope'"),
        (["targets.modules=[q_proj,nope]"], 4, "'nope' matches no layer"),
        (["model.path=/no/such/folder"], 4, "no such folder"),
        (["rnak=4"], 2, "did you mean 'rank'?"),
    ],
    ids=str,
)
def test_bad_words_get_one_line_and_an_exit_code(words, code, said, cli):
    got, out, err = cli("count-params", *words)
    assert got == code
    assert said in err
    assert err.startswith(f"error[{code}]") and err.count("\n") == 1
    assert out == ""


def test_published_counts_are_judged(cli):
    code, out, _ = cli("count-params", "published=true")
    assert code == 0
    assert "exact 294,912               wrong" in out
    assert out.splitlines()[-1].startswith(tuple("0123456789"))


def test_activations_show_what_frozen_a_saves(cli):
    words = ("model=opt_125m", "targets=attention_qv", "activations=true", "rank=8")
    measured = {row["variant"]: row for row in counted(cli, *words)["activations"]}
    # q and v share one fp32 input of 768 numbers; LoRA keeps it, LoRA-FA only r numbers a layer.
    assert measured["lora_fa"]["added"] == 2 * 8 * 4
    assert measured["lora"]["added"] >= measured["lora_fa"]["added"]
    assert measured["lora"]["base"] == measured["lora_fa"]["base"] > 0
