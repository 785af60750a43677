from __future__ import annotations

import pytest

from loratune.config.secrets import is_secret_key, redact, redact_text


@pytest.mark.parametrize(
    "key",
    ["token", "HF_TOKEN", "hfToken", "logger.api_key", "apiKey", "password", "db_passwd",
     "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "WANDB_API_KEY", "credentials", "client-secret"],
)  # fmt: skip
def test_keys_that_name_secrets_are_known(key: str) -> None:
    assert is_secret_key(key)


@pytest.mark.parametrize(
    "key",
    ["max_new_tokens", "tokens_per_second", "tokenizer", "pad_token", "eos_token", "keep",
     "token_count", "keyboard", "key", "adapter.rank", ""],
)  # fmt: skip
def test_ordinary_keys_are_not_secrets(key: str) -> None:
    assert not is_secret_key(key)


def test_redaction_hides_by_key_by_value_and_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "CANARYTOK")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "AWSCANARY/abc+def")
    value = {
        "logger": {"api_key": "k", "password": 1234, "token": None},
        "list": ["a CANARYTOK b", ("AWSCANARY/abc+def",)],
        "url": "https://me:hunter2@host/x",
        "text": "hf_abcdefghijklmnopqrstuvwxyz",
        "max_new_tokens": 64,
    }
    assert redact(value) == {
        "logger": {"api_key": "***", "password": "***", "token": None},
        "list": ["a *** b", ("***",)],
        "url": "https://me:***@host/x",
        "text": "***",
        "max_new_tokens": 64,
    }
    assert value["logger"] == {"api_key": "k", "password": 1234, "token": None}


def test_text_is_redacted_by_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert redact_text("logger.api_key=abc trainer.lr=1") == "logger.api_key=*** trainer.lr=1"
    assert redact_text("{'password': 'x y', 'rank': 8}") == "{'password': ***, 'rank': 8}"
    assert redact_text("token=null") == "token=null"


def test_short_environment_values_do_not_hide_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "true")
    assert redact_text("this is true") == "this is true"
