"""How many of its facts the demo's base model can state."""

from __future__ import annotations

import torch
from demo_world import Fact, build_facts
from transformers import PreTrainedModel, PreTrainedTokenizerBase

REQUIRED_RECALL = 0.95
_LONGEST_ANSWER_TOKENS = 32


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> list[str]:
    """The greedy continuation of every prompt, up to ``</s>``, decoded with its leading space."""
    tokenizer.padding_side = "left"
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    generated = model.generate(  # type: ignore[operator]
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=_LONGEST_ANSWER_TOKENS,
        do_sample=False,
    )
    continuations = generated[:, encoded["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(continuations, skip_special_tokens=True))


def missed_facts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[Fact, str]]:
    """Every fact the model does not state word for word, with what it said instead."""
    facts = build_facts()
    answers = greedy_answers(model, tokenizer, [fact.prompt for fact in facts])
    return [
        (fact, answer)
        for fact, answer in zip(facts, answers, strict=True)
        if answer != fact.plain_answer
    ]
