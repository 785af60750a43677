"""The tokenizer beside an adapter that resized the vocabulary, or trained tokens of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loratune import files
from loratune.adapter_files.peft_format import AdapterFolder
from loratune.models.weights import inside

TOKENIZER = "tokenizer.json"


def own_tokenizer(adapter: AdapterFolder, rows: int, *, resized: bool) -> tuple[Path | None, str]:
    """The adapter's folder where a tokenizer with the tokens that it trained lies in it.

    Args:
        adapter: as read; one that neither resized nor trained tokens has none of its own.
        rows: of the embeddings, with the adapter in the model.
        resized: whether the base has another number.

    Returns:
        The folder, or nothing and what to say about it.

    Raises:
        SecurityError: if the tokenizer is a link out of the folder.
    """
    path = inside(adapter.path, TOKENIZER)
    if not resized and not (adapter.peft.get("trainable_token_indices") and path.is_file()):
        return None, ""
    done = f"resized the vocabulary to {rows:,} rows" if resized else "trained single tokens"
    what = f"the adapter in {adapter.path} {done}"
    if not path.is_file():
        return None, f"{what} and brings no {TOKENIZER}: the base's tokenizer is used"
    try:
        largest = max(_ids(files.read_json(path)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None, f"{what}, and its {TOKENIZER} is unreadable: the base's is used"
    if largest >= rows:
        beyond = f"its {TOKENIZER} has ids up to {largest:,}, the embeddings {rows:,} rows"
        return None, f"{what}, but {beyond}: the base's is used"
    return adapter.path, ""


def _ids(tokenizer: Any) -> Iterator[int]:
    """Every token's id; the vocabulary is a mapping, or a list in the order of ids."""
    vocabulary = tokenizer["model"]["vocab"]
    yield from vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    yield from (int(token["id"]) for token in tokenizer.get("added_tokens") or ())
