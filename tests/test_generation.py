"""Generation stops at the end token and within the model's positions."""

from __future__ import annotations

import pytest
from support.tiny_models import tiny_opt
from transformers import AutoTokenizer

from loratune.errors import DataError
from loratune.generation import Sampling, generate_answers
from loratune.models.source import model_folder


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_folder("builtin:demo-opt"))


@pytest.fixture(scope="module")
def model():
    return tiny_opt(vocab_size=740, max_position_embeddings=24).eval()


def test_batched_greedy_answers_equal_single_ones(model, tokenizer) -> None:
    prompts = [[2, 10, 11, 12], [2, 20], [2, 30, 31, 32, 33, 34]]
    sampling = Sampling(max_new_tokens=6, batch_size=3)
    together = generate_answers(model, tokenizer, prompts, sampling, 1)
    alone = [generate_answers(model, tokenizer, [p], sampling, 1)[0] for p in prompts]
    assert together == alone


def test_an_answer_ends_where_the_positions_end(model, tokenizer) -> None:
    sampling = Sampling(max_new_tokens=100)
    [answer] = generate_answers(model, tokenizer, [[2, *range(5, 20)]], sampling, 1)
    assert len(tokenizer(answer, add_special_tokens=False)["input_ids"]) <= 24 - 16 + 2


def test_a_prompt_without_room_for_an_answer_is_named(model, tokenizer) -> None:
    with pytest.raises(DataError, match="no room"):
        generate_answers(model, tokenizer, [[2] * 24], Sampling(), 1)


def test_sampling_follows_its_seed(model, tokenizer) -> None:
    prompts = [[2, 10, 11]]
    one = Sampling(max_new_tokens=8, temperature=1.0, seed=1)
    two = Sampling(max_new_tokens=8, temperature=1.0, seed=2)
    first = generate_answers(model, tokenizer, prompts, one, 1)
    assert first == generate_answers(model, tokenizer, prompts, one, 1)
    assert first != generate_answers(model, tokenizer, prompts, two, 1)
