#!/usr/bin/env python3
"""Make the embedded demo: a small OPT that knows a closed world, and data that changes its style.

    python scripts/make_demo_base.py                  rebuild loratune/assets/ (about two minutes)
    python scripts/make_demo_base.py --verify DIR     only check an existing model folder

Exits with 1 when the model recalls 95 % of its facts or less, and then writes no model. The seed
fixes the text and the initial weights; the trained weights may differ in their last bits between
machines and thread counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from demo_model import build_model, pretrain, train_tokenizer
from demo_recall import REQUIRED_RECALL, missed_facts
from demo_tasks import write_demo_data
from demo_world import build_facts
from transformers import AutoModelForCausalLM, AutoTokenizer

ASSETS = Path(__file__).resolve().parent.parent / "loratune" / "assets"


def verify(folder: Path) -> bool:
    """Print the recall of the model in ``folder``, as stored; true if it is above the bound."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    missed = missed_facts(model, tokenizer)
    total = len(build_facts())
    recall = 1 - len(missed) / total
    print(f"{folder.name}: {total - len(missed)} of {total} facts recalled ({recall:.1%})")
    for fact, answer in missed:
        print(f"  expected {fact.plain_answer!r}, got {answer!r}")
    return recall > REQUIRED_RECALL


def save_model(folder: Path, steps: int, seed: int) -> None:
    """Pretrain the base model and save it in bfloat16 with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    model = build_model(len(tokenizer))
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    pretrain(model, tokenizer, steps)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--verify", type=Path, metavar="DIR", help="only check this model folder")
    parser.add_argument("--out", type=Path, default=ASSETS, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--data-only", action="store_true", help="rewrite only the data files")
    return parser.parse_args()


def main() -> int:
    """Run the command line; the return value is the exit code."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.verify is not None:
        return 0 if verify(arguments.verify) else 1
    write_demo_data(arguments.out / "demo-data")
    if arguments.data_only:
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.out) as scratch:
        folder = Path(scratch) / "demo-opt"
        save_model(folder, arguments.steps, arguments.seed)
        if not verify(folder):
            return 1
        published = arguments.out / "demo-opt"
        published.mkdir(exist_ok=True)
        for file in sorted(folder.iterdir()):
            file.chmod(0o644)  # safetensors writes files that only their owner can read
            file.replace(published / file.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
