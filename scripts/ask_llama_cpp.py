"""Ask a GGUF model in llama.cpp what `loratune generate` answered, as any chat client would.

usage: python scripts/ask_llama_cpp.py MODEL.gguf ANSWERS.jsonl [--lora ADAPTER.gguf]

ANSWERS.jsonl is what `loratune generate prompts=ROWS.jsonl > ANSWERS.jsonl` printed for chat rows.
llama-cpp-python renders the chat template in the file, tokenizes, samples at temperature 0 and
stops where the file says; the texts must be the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llama_cpp import Llama

SHOWN = 3


def question(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """A row's turns without the answer that it ends in."""
    return turns[:-1] if turns[-1]["role"] == "assistant" else turns


def main() -> None:
    """Print how many answers are the same, and the first that are not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("answers", type=Path)
    parser.add_argument("--lora")
    words = parser.parse_args()
    records = [json.loads(line) for line in words.answers.read_text(encoding="utf-8").splitlines()]
    model = Llama(words.model, n_ctx=2048, lora_path=words.lora, verbose=False)
    same, right, differing = 0, 0, []
    for record in records:
        turns = record["prompt"]["messages"]
        reply = model.create_chat_completion(question(turns), temperature=0.0, max_tokens=64)
        text = reply["choices"][0]["message"]["content"]
        same += text == record["adapted"]
        right += text.strip() == turns[-1]["content"]
        if text != record["adapted"]:
            differing.append((question(turns)[-1]["content"], record["adapted"], text))
    print(f"{same} of {len(records)} answers are loratune's, {right} are the rows' own")
    for asked, ours, theirs in differing[:SHOWN]:
        print(f"  {asked!r}: loratune {ours!r}, llama.cpp {theirs!r}")


if __name__ == "__main__":
    main()
