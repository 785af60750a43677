"""A model's vocabulary: its two embeddings, tokens added to it, and rows for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratune.errors import ConfigError
from loratune.models.build import read_transformers_config
from loratune.models.load import load_tokenizer
from loratune.models.source import read_model_config


def embedding_names(model: Any) -> list[str]:
    """Names of the input embedding and the output head, as far as the model has them."""
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    names = [next((n for n, m in model.named_modules() if m is end), "") for end in ends if end]
    return [name for name in names if name]


def tokenizer_and_rows(folder: Path, added: Sequence[str] = ()) -> tuple[Any, int]:
    """A model folder's tokenizer with tokens added to it, and how many rows its embeddings need.

    Raises:
        LoratuneError: a folder without a usable tokenizer; a token that cannot be added.
    """
    read_model_config(folder)
    tokenizer = load_tokenizer(folder)
    text = read_transformers_config(folder).get_text_config()
    rows = int(getattr(text, "vocab_size", None) or len(tokenizer))
    if added:
        add_tokens(tokenizer, added)
        rows = max(rows, len(tokenizer))
    return tokenizer, rows


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add texts that are one token each from now on, wherever they stand in a row.

    They are not special tokens in transformers' sense: rows may spell them, and answers show them.

    Raises:
        ConfigError: for a text that is empty or a token already.
    """
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if not token.strip():
            raise ConfigError("a token cannot be empty", where="model.add_tokens", fix="remove it")
        if token in vocabulary:
            raise ConfigError(
                f"'{token}' is a token already",
                where="model.add_tokens",
                fix="name it in targets.tokens to train it",
            )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])


def token_ids(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Ids of tokens of the vocabulary, each once.

    Raises:
        ConfigError: naming a text that is not one token.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise ConfigError(
                f"'{token}' is not a token of the vocabulary",
                where="targets.tokens",
                fix="add it with model.add_tokens, or write it as the vocabulary does",
            )
    return list(dict.fromkeys(int(vocabulary[token]) for token in tokens))


def grow(model: Any, rows: int) -> None:
    """Give the embeddings so many rows; new ones are the mean of the others."""
    import torch

    before = int(model.get_input_embeddings().weight.shape[0])
    with torch.no_grad():
        model.resize_token_embeddings(rows, mean_resizing=False)
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            if end is not None and rows > before and not end.weight.is_meta:
                end.weight[before:] = end.weight[:before].float().mean(0).to(end.weight.dtype)
