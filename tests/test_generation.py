"""Generation stops at the end token and within the model's positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bases.tiny_base import tiny_config
from support.tiny_models import tiny_gpt2, tiny_llama, tiny_mistral, tiny_opt, tiny_rwkv
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune.errors import DataError
from loratune.generation import Sampling, answer_text, generate_answers, stream_answer
from loratune.models.probes.batched_generation import probe_batched_generation, probe_cache
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


@pytest.mark.parametrize("name", ["blt", "prophetnet", "xlstm", "llama"])
def test_a_model_that_fails_with_its_cache_is_asked_without_it(name: str, tokenizer) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name)).eval()
    assert probe_cache(model) == (name == "llama")
    prompt, shown = [3, 4, 5, 6], list[str]()
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, 4).long()}
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": 1, "pad_token_id": 1}
    [ids] = model.generate(**inputs, **settings, use_cache=False)
    expected = answer_text(tokenizer, ids[4:].tolist(), [1])
    sampling = Sampling(max_new_tokens=4)
    assert generate_answers(model, tokenizer, [prompt], sampling, 1, [1]) == [expected]
    assert stream_answer(model, tokenizer, prompt, sampling, 1, [1], shown.append) == expected
    assert "".join(shown) == expected


@pytest.mark.parametrize("count", [1, 2])
def test_what_goes_wrong_while_answers_are_written_is_not_hidden(count: int, tokenizer) -> None:
    model = tiny_opt(vocab_size=740).eval()
    prompts = [[2, 10, 11], [2, 12]][:count]
    generate_answers(model, tokenizer, prompts, Sampling(max_new_tokens=2), 1)  # the probe

    def failing(module: Any, args: Any, options: Any) -> None:
        if options["use_cache"]:
            raise AttributeError("a mistake of the model's")

    handle = model.register_forward_pre_hook(failing, with_kwargs=True)
    with handle, pytest.raises(AttributeError, match="a mistake of the model's"):
        generate_answers(model, tokenizer, prompts, Sampling(max_new_tokens=2), 1)


def test_a_model_that_computes_nothing_without_its_cache_keeps_it(monkeypatch) -> None:
    model = tiny_llama().eval()
    forward = type(model).forward

    def needs_its_cache(self, *args, use_cache=None, **named):
        if use_cache is False:
            raise ValueError("this model needs its cache")
        return forward(self, *args, use_cache=use_cache, **named)

    monkeypatch.setattr(type(model), "forward", needs_its_cache)
    assert probe_cache(model)
