from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TINY_TEXT = [
    "the cat sat on the mat . red fox",
    "Question: what is the colour of the sky? Answer: blue",
    "name : Alimentum | area : city centre | family friendly : no",
    "user assistant system hello world one two three",
]


def byte_level_tokenizer(*, start: bool, pad: bool, chat_template: str | None = None) -> Any:
    """A byte-level BPE: OPT's kind with a start token, GPT-2's kind without start and pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TINY_TEXT * 5, trainer)
    names = {"eos_token": "</s>"}
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
        names["bos_token"] = "<s>"
    if pad:
        names["pad_token"] = "<pad>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
        **names,
    )
    fast.chat_template = chat_template
    return fast


def space_prefixing_tokenizer() -> Any:
    """SentencePiece's manner: a space is put before every text that is encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([*TINY_TEXT, "line\nbreak\n"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def opt_like() -> Any:
    return byte_level_tokenizer(start=True, pad=True)


@pytest.fixture(scope="session")
def gpt2_like() -> Any:
    return byte_level_tokenizer(start=False, pad=False)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def shared() -> Path:
    root = Path(__file__).parents[2]
    folder = Path(os.environ.get("LORATUNE_SHARED", root.parent / "shared"))
    if not (folder / "data" / "e2e" / "train.jsonl").exists():
        pytest.skip("LORATUNE_SHARED has no e2e rows")
    return folder
