"""``verify served=``: a right server is never accused, a wrong one is, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.http_server import serving
from support.served_model import (
    CHAT,
    OTHER_CHAT,
    ModelServer,
    adapted_model,
    chat_tokenizer,
    conversations,
    recorded,
    rounded_to_blocks,
)

from loratune.errors import ConfigError, MergeError
from loratune.runs.golden import Golden, read_golden, write_golden
from loratune.surgery import WrappedModel
from loratune.verify import Verification
from loratune.verify.served import verify_served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return chat_tokenizer(folder)


@pytest.fixture(scope="module")
def golden(folder: Path, tokenizer: Any) -> Path:
    write_golden(
        folder / "golden.json",
        recorded(adapted_model(), tokenizer, conversations(folder, tokenizer)),
    )
    return folder / "golden.json"


def asked(golden: Path, server: ModelServer, **options: Any) -> Verification:
    with serving(server.reply) as url:
        return verify_served(url, golden, **options)


def statuses(result: Verification) -> list[str]:
    return [check.status for check in result.checks]


def scaled(factor: float) -> WrappedModel:
    wrapped = adapted_model()
    for layer in wrapped.adapters.values():
        layer.scaling *= factor
    return wrapped


RIGHT: dict[str, Callable[[], WrappedModel]] = {
    "itself": adapted_model,
    "in bf16": lambda: _as(adapted_model(), torch.bfloat16),
    "on a base of four bits": lambda: rounded_to_blocks(adapted_model()),
    "on a base of three bits": lambda: rounded_to_blocks(adapted_model(), levels=7),
}


def _as(wrapped: WrappedModel, dtype: torch.dtype) -> WrappedModel:
    with torch.no_grad():
        for parameter in wrapped.model.parameters():
            parameter.copy_(parameter.to(dtype).to(parameter.dtype))
    return wrapped


@pytest.mark.parametrize("logprobs", ["tells", "keeps", "refuses"])
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_server_is_never_accused(
    name: str, logprobs: str, golden: Path, tokenizer: Any
) -> None:
    result = asked(golden, ModelServer(RIGHT[name](), tokenizer, logprobs=logprobs))
    assert result.problems == []
    if name in ("itself", "in bf16"):
        assert statuses(result) == ["ok", "ok"]


WRONG: dict[str, tuple[Callable[[], WrappedModel], str]] = {
    "the base": (lambda: scaled(0.0), "the base model"),
    "a quarter": (lambda: scaled(0.25), "wrong scale"),
    "half": (lambda: scaled(0.5), "wrong scale"),
    "twice": (lambda: scaled(2.0), "wrong scale"),
    "another adapter": (lambda: adapted_model(seed=2), "another adapter"),
    "twice on four bits": (lambda: rounded_to_blocks(scaled(2.0)), "wrong scale"),
    "the base in four bits": (lambda: rounded_to_blocks(scaled(0.0)), "base|another"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_server_is_named(name: str, golden: Path, tokenizer: Any) -> None:
    made, words = WRONG[name]
    result = asked(golden, ModelServer(made(), tokenizer))
    assert statuses(result) == ["differs", "not checked"]
    with pytest.raises(MergeError, match=words) as refused:
        result.raise_problems()
    assert refused.value.exit_code == 7


@pytest.mark.parametrize("name", ["the base", "another adapter"])
def test_without_log_probabilities_the_answers_tell(
    name: str, golden: Path, tokenizer: Any
) -> None:
    made = WRONG[name][0]
    result = asked(golden, ModelServer(made(), tokenizer, logprobs="refuses"))
    assert result.problems and "answers are the adapted model's" in result.problems[0].problem


def test_another_template_is_told_from_another_model(golden: Path, tokenizer: Any) -> None:
    result = asked(golden, ModelServer(adapted_model(), tokenizer, template=OTHER_CHAT))
    assert statuses(result) == ["ok", "differs"]
    assert "another template" in result.problems[0].problem


def test_a_template_with_one_turn_more_is_told_by_its_length(golden: Path, tokenizer: Any) -> None:
    longer = "system: Be brief.\n" + CHAT
    result = asked(golden, ModelServer(adapted_model(), tokenizer, template=longer))
    assert "another template" in result.problems[0].problem


@pytest.mark.parametrize("logprobs", ["tells", "refuses"])
def test_where_text_is_not_completed_conversations_tell(
    logprobs: str, golden: Path, tokenizer: Any
) -> None:
    only = ("/v1/chat/completions",)
    right = ModelServer(adapted_model(), tokenizer, paths=only, logprobs=logprobs)
    assert statuses(asked(golden, right)) == ["not checked", "ok"]
    wrong = ModelServer(scaled(0.0), tokenizer, paths=only, logprobs=logprobs)
    assert statuses(asked(golden, wrong)) == ["not checked", "differs"]
    other = ModelServer(adapted_model(), tokenizer, OTHER_CHAT, paths=only, logprobs=logprobs)
    assert "differs" in statuses(asked(golden, other))


def test_of_several_models_one_is_named(golden: Path, tokenizer: Any) -> None:
    server = ModelServer(adapted_model(), tokenizer, names=("base", "mine"))
    with pytest.raises(ConfigError, match=r"several models.*base, mine"):
        asked(golden, server)
    with pytest.raises(ConfigError, match="no model 'other'"):
        asked(golden, server, chosen="other")
    assert statuses(asked(golden, server, chosen="mine")) == ["ok", "ok"]


def test_what_is_recorded_are_the_log_probabilities_of_the_scaled_model(
    golden: Path, tokenizer: Any
) -> None:
    record: Golden = read_golden(golden)
    prompt = record.prompts[0]
    ids = tokenizer(prompt.text)["input_ids"]
    assert len(ids) == prompt.tokens
    for place, strength in enumerate(record.strengths):
        wrapped = scaled(strength)
        for layer in wrapped.adapters.values():
            layer.merge()
        with torch.inference_mode():
            expected = wrapped.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        own = {tokenizer.decode([n]): float(value) for n, value in enumerate(expected)}
        assert set(prompt.first) <= set(own)
        for text, values in prompt.first.items():
            assert values[place] == pytest.approx(own[text], abs=2e-4)
