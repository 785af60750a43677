"""Generation stops at the end token and within the model's positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import tiny_gpt2, tiny_llama, tiny_mistral, tiny_opt, tiny_rwkv
from transformers import AutoTokenizer

from loratune.errors import DataError
from loratune.generation import Sampling, _written, generate_answers
from loratune.models.probes.batched_generation import probe_batched_generation
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


def alone(model, tokenizer, prompts: list[list[int]], sampling: Sampling) -> list[str]:
    return [generate_answers(model, tokenizer, [prompt], sampling, 1)[0] for prompt in prompts]


COMMON = [2, *range(40, 70)]
PROMPTS = [[*COMMON, 10, 11, 12], [*COMMON, 20], [*COMMON, 30, 31], [*COMMON, 32, 33, 34, 35, 36]]
FAMILIES = {
    "opt": lambda: tiny_opt(vocab_size=740),
    "llama": lambda: tiny_llama(vocab_size=740),
    "gpt2": lambda: tiny_gpt2(vocab_size=740),
    "mistral, a window within the prompts": lambda: tiny_mistral(vocab_size=740),
    "rwkv, no mask": tiny_rwkv,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_begin_alike_are_answered_as_alone(family: str, tokenizer) -> None:
    model = FAMILIES[family]().eval()
    sampling = Sampling(max_new_tokens=6, batch_size=3)
    expected = alone(model, tokenizer, PROMPTS, sampling)
    assert len(set(expected)) > 1
    assert generate_answers(model, tokenizer, PROMPTS, sampling, 1) == expected


def test_the_common_beginning_is_encoded_once(tokenizer) -> None:
    model = tiny_opt(vocab_size=740).eval()
    generate_answers(model, tokenizer, PROMPTS, Sampling(max_new_tokens=2), 1)  # the probe
    widths = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generate_answers(model, tokenizer, PROMPTS, Sampling(max_new_tokens=2, batch_size=2), 1)
    handle.remove()
    assert widths.count((1, len(COMMON))) == 1
    assert all(width < 8 for count, width in widths if count > 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_tells_padding_and_prefixes_apart(family: str) -> None:
    probe = probe_batched_generation(FAMILIES[family]().eval(), 40, range(3, 700))
    assert probe.padded == (not family.startswith("rwkv"))
    assert probe.prefixed == (family in ("opt", "llama", "gpt2"))


def test_a_model_whose_own_cache_fails_is_asked_without_it() -> None:
    model = tiny_opt()
    generate, asked = model.generate, list[object]()

    def failing(**options: Any) -> Any:
        asked.append(options.get("use_cache"))
        if options.get("use_cache") is not False:
            raise AttributeError("no attribute 'num_hidden_layers'")
        return generate(**options)

    inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    expected = generate(**inputs, max_new_tokens=4, do_sample=False)
    model.generate = failing
    found = _written(model, inputs, {"max_new_tokens": 4, "do_sample": False}, cached=True)
    assert torch.equal(found, expected)
    assert asked == [None, False]
