#!/usr/bin/env python3
r"""Make a third task for comparisons: a small OPT that knows some numbers, asked for their names.

    python scripts/make_number_base.py --out numbers      about a minute on two quiet cores
    loratune compare recipe=demo name=numbers model.path=numbers/base \
        data.path=numbers/train.jsonl data.eval_path=numbers/dev.jsonl \
        data.test_path=numbers/test.jsonl compare.heldout_path=numbers/heldout.jsonl

The base is pretrained on sentences about the numbers from 0 to 99: their names, their neighbours,
in digits and in words.  Fine-tuning asks for a neighbour, which it knows in digits, in words.  No
number is asked about in two of the three files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from demo_model import build_model, pretrain, train_tokenizer

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMBERS = range(1, 99)
_SPLIT = {"train": 48, "dev": 25, "test": 25}
_HELD_OUT = 200


def name(number: int) -> str:
    """A number below 100 in words."""
    if number < len(_ONES):
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f" {_ONES[ones]}" if ones else "")


def prompts(number: int) -> list[tuple[str, int]]:
    """Both questions about a number, with their answers."""
    return [
        (f"Question: Which number comes after {number}?\nAnswer:", number + 1),
        (f"Question: Which number comes before {number}?\nAnswer:", number - 1),
    ]


def documents(seed: int) -> Iterator[str]:
    """An endless stream of sentences and of questions answered in digits."""
    draw = random.Random(seed)
    while True:
        number = draw.choice(_NUMBERS)
        if draw.random() < 0.4:
            question, answer = draw.choice(prompts(number))
            yield f"{question} {answer}"
            continue
        sentences = [
            f"The number {number} is written {name(number)}.",
            f"In digits {name(number)} is {number}.",
            f"After {name(number)} comes {name(number + 1)}.",
            f"Before {number} comes {number - 1}.",
        ]
        yield " ".join(draw.sample(sentences, 3))


def write_rows(folder: Path) -> None:
    """The three files of questions, split by number, and text for measuring forgetting."""
    numbers = list(_NUMBERS)
    random.Random(0).shuffle(numbers)
    start = 0
    for split, count in _SPLIT.items():
        rows = [
            {"prompt": question, "completion": f" {name(answer)}"}
            for number in sorted(numbers[start : start + count])
            for question, answer in prompts(number)
        ]
        _write(folder / f"{split}.jsonl", rows)
        start += count
    texts = dict.fromkeys(text for text in itertools.islice(documents(7), 2000) if "?" not in text)
    _write(folder / "heldout.jsonl", [{"text": text} for text in list(texts)[:_HELD_OUT]])


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write the rows, then pretrain and save the base."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=350, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_rows(arguments.out)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(documents)
    model = build_model(len(tokenizer))
    pretrain(model, tokenizer, arguments.steps, documents)
    model.save_pretrained(arguments.out / "base")
    tokenizer.save_pretrained(arguments.out / "base")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
