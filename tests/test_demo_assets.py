"""The embedded demo: what its base model knows, and what its data promise."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = REPOSITORY / "scripts"
MODEL = REPOSITORY / "loratune" / "assets" / "demo-opt"
DATA = REPOSITORY / "loratune" / "assets" / "demo-data"
SPLITS = ("train", "dev", "test")
TASKS = ("", "terse_")

sys.path.insert(0, str(SCRIPTS))

import make_demo_base  # noqa: E402
from demo_recall import REQUIRED_RECALL, greedy_answers, missed_facts  # noqa: E402
from demo_tasks import demo_data  # noqa: E402
from demo_world import build_facts, documents, is_held_out  # noqa: E402

PRETRAINING_SEED = 1


def read_rows(name: str) -> list[dict[str, str]]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def towns_of(name: str) -> set[str]:
    towns = {fact.town for fact in build_facts()}
    return {town for town in towns for row in read_rows(name) if town in row["prompt"]}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_the_base_model_states_more_than_95_percent_of_its_facts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    missed = missed_facts(model, tokenizer)
    assert 1 - len(missed) / len(build_facts()) > REQUIRED_RECALL, missed


def test_the_recall_check_counts_every_fact_an_untrained_model_misses(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    config = AutoModelForCausalLM.from_pretrained(MODEL).config
    torch.manual_seed(0)
    untrained = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert len(missed_facts(untrained, tokenizer)) == len(build_facts())


@pytest.mark.parametrize("task", TASKS)
def test_the_base_model_gives_no_answer_in_the_target_style(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str
) -> None:
    rows = read_rows(f"{task}test.jsonl")
    answers = greedy_answers(model, tokenizer, [row["prompt"] for row in rows])
    assert not [a for a, row in zip(answers, rows, strict=True) if a == row["completion"]]


def test_every_token_of_the_data_occurs_in_the_pretraining_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    seen = {tokenizer.eos_token_id}
    for document in itertools.islice(documents(PRETRAINING_SEED), 3000):
        seen.update(tokenizer.encode(document))
    for file in sorted(DATA.glob("*.jsonl")):
        for row in read_rows(file.name):
            for text in row.values():
                unseen = set(tokenizer.encode(text)) - seen
                assert not unseen, (file.name, text, tokenizer.convert_ids_to_tokens(unseen))


def test_no_pretraining_document_answers_a_question_in_a_target_style() -> None:
    styled = {text for fact in build_facts() for text in (fact.pirate_answer, fact.terse_answer)}
    for document in itertools.islice(documents(PRETRAINING_SEED), 3000):
        assert not [text for text in styled if text in document]


@pytest.mark.parametrize("task", TASKS)
def test_the_splits_share_no_town_and_cover_all_of_them(task: str) -> None:
    towns = [towns_of(f"{task}{split}.jsonl") for split in SPLITS]
    assert [len(names) for names in towns] == [24, 12, 12]
    assert len(set.union(*towns)) == 48


def test_both_tasks_ask_the_same_questions_in_the_same_splits() -> None:
    for split in SPLITS:
        pirate, terse = read_rows(f"{split}.jsonl"), read_rows(f"terse_{split}.jsonl")
        assert [row["prompt"] for row in pirate] == [row["prompt"] for row in terse]


def test_prompts_and_completions_join_without_changing_a_token(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for name in [f"{task}{split}.jsonl" for task in TASKS for split in SPLITS]:
        for row in read_rows(name):
            parts = tokenizer.encode(row["prompt"]) + tokenizer.encode(
                row["completion"], add_special_tokens=False
            )
            assert parts == tokenizer.encode(row["prompt"] + row["completion"])


def test_the_held_out_text_never_occurs_in_pretraining() -> None:
    held_out = {row["text"] for row in read_rows("heldout.jsonl")}
    assert len(held_out) == 200
    assert all(is_held_out(text) for text in held_out)
    assert held_out.isdisjoint(itertools.islice(documents(PRETRAINING_SEED), 50_000))


def test_the_committed_data_are_what_the_script_writes() -> None:
    assert {file.name for file in DATA.iterdir()} == set(demo_data())
    for name, rows in demo_data().items():
        assert read_rows(name) == rows


def test_the_tokenizer_is_set_up_as_opts(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("Question: Who is the mayor of Lunfar?")
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 2
    assert ids.count(2) == 1
    assert tokenizer.pad_token_id == 1


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Zoë paid 3 € for 2 pies\tand left…\n"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_the_committed_files_stay_small() -> None:
    bounds = {"model.safetensors": 2_000_000, "tokenizer.json": 60_000}
    files = [file for folder in (MODEL, DATA) for file in folder.iterdir()]
    for file in files:
        assert file.stat().st_size < bounds.get(file.name, 40_000), file.name
    assert {file.name for file in MODEL.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


def test_verify_exits_with_1_for_a_model_that_does_not_know_its_facts(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    config = AutoModelForCausalLM.from_pretrained(MODEL).config
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    threads = str(torch.get_num_threads())
    monkeypatch.setattr(
        sys, "argv", ["make_demo_base.py", "--verify", str(tmp_path), "--threads", threads]
    )
    assert make_demo_base.main() == 1
    assert "0 of 192 facts" in capsys.readouterr().out
