from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import loratune
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


def test_no_message_of_ours_is_taken_for_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text of the package, whatever stands in its places, but those about secrets."""
    monkeypatch.setattr("os.environ", {})
    package = Path(loratune.__file__).parent
    hidden = [
        f"{path.relative_to(package)}: {text}"
        for path in sorted(package.rglob("*.py"))
        for text in _texts_of(ast.parse(path.read_text(encoding="utf-8")))
        if redact_text(text) != text
    ]
    assert not hidden, hidden


def _texts_of(tree: ast.AST) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    comments = {
        id(part.value)
        for node in ast.walk(tree)
        if isinstance(node, documented)
        for part in node.body
        if isinstance(part, ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else "X" for part in node.values
            )
        elif isinstance(node, ast.Constant) and id(node) not in comments:
            yield str(node.value)
