"""The demo's fine-tuning data: the known questions, answered in a new style, split by town."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

from demo_world import WORLD_SEED, Fact, build_facts, documents

SPLIT_TOWNS = {"train": 24, "dev": 12, "test": 12}
HELD_OUT_DOCUMENTS = 200
_HELD_OUT_SEED = 7


def split_facts() -> dict[str, list[Fact]]:
    """The facts of each split; a town belongs to exactly one split."""
    facts = build_facts()
    towns = sorted({fact.town for fact in facts})
    random.Random(WORLD_SEED + 1).shuffle(towns)
    splits: dict[str, list[Fact]] = {}
    start = 0
    for name, count in SPLIT_TOWNS.items():
        chosen = set(towns[start : start + count])
        splits[name] = [fact for fact in facts if fact.town in chosen]
        start += count
    return splits


def demo_data() -> dict[str, list[dict[str, str]]]:
    """The rows of every data file, keyed by file name."""
    files: dict[str, list[dict[str, str]]] = {}
    for split, facts in split_facts().items():
        files[f"{split}.jsonl"] = [
            {"prompt": fact.prompt, "completion": fact.pirate_answer} for fact in facts
        ]
        files[f"terse_{split}.jsonl"] = [
            {"prompt": fact.prompt, "completion": fact.terse_answer} for fact in facts
        ]
    unique = dict.fromkeys(
        itertools.islice(documents(_HELD_OUT_SEED, held_out=True), 4 * HELD_OUT_DOCUMENTS)
    )
    held_out = list(unique)[:HELD_OUT_DOCUMENTS]
    files["heldout.jsonl"] = [{"text": text} for text in held_out]
    return files


def write_demo_data(folder: Path) -> None:
    """Write the data files as UTF-8 JSON lines into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in demo_data().items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / name).write_text("".join(lines), encoding="utf-8")
