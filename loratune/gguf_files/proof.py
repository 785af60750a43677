"""Whether llama.cpp answers as loratune does: the same prompts, step by step, on the same tokens.

llama.cpp is shown each prompt with loratune's own greedy answer.  While its first choice is the
answer's next token at every step, its greedy answer is the same; where it is not, the gap between
the two tokens' logits tells a near tie from another model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.peft_format import AdapterFolder
from loratune.config.schema import GgufDtype
from loratune.data.tokenizing import Tokenizer
from loratune.errors import MergeError
from loratune.generation import Sampling, generate_ids
from loratune.gguf_files.llama_cpp import LlamaCpp, running, version
from loratune.gguf_files.questions import TEXTS
from loratune.models.load import load_model
from loratune.surgery import disabled

NEW_TOKENS = 32
GAPS = {GgufDtype.f32: 0.05, GgufDtype.f16: 0.05, GgufDtype.bf16: 0.4}
"""Largest difference of two logits that the rounding of weights and activations may swap.

llama.cpp keeps keys and values in f16, and multiplies f16 weights with f16 activations.  Up to
0.007 (f16) and 0.14 (bf16) was seen.  The eight bits of q8_0 are reported and not judged.
"""


@dataclass(frozen=True)
class Answers:
    """Greedy answers, with the logits that led to them.

    Attributes:
        prompts: token ids.
        answers: token ids, the end token included where there was one.
        logits: of each answer, (its tokens, vocabulary), in fp32.
        base_logits: the base model's, on the adapted model's answers.
        stops: every id that ends an answer.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    logits: list[Tensor]
    base_logits: list[Tensor]
    stops: list[int]


@dataclass(frozen=True)
class LlamaCppProof:
    """What llama.cpp made of the same prompts.

    Attributes:
        version: of the package that was asked.
        prompts: how many were asked.
        answered_alike: those whose greedy answer is the same token by token.
        tokens: steps compared.
        agreement: share of steps with the same first choice.
        mean_kl: mean of KL(loratune ‖ llama.cpp) over the steps, in nats.
        mean_kl_base: the same with the base in llama.cpp's place, for scale: loratune's, or, for an
            adapter on a file of somebody else, that file without the adapter.
        largest_gap: over the prompts answered otherwise, loratune's logit of its own token above
            that of llama.cpp's at the first step that differs.
        gap_bound: what ``largest_gap`` had to stay below; ``None`` where nothing was promised.
        prompts_tokenized_alike: prompts whose text gives llama.cpp the same ids.
        texts_tokenized_otherwise: of the texts made to tell tokenizers apart, those that do; of a
            file that loratune wrote, none may.
        ends: the end tokens, at all of which llama.cpp stops.
    """

    version: str
    prompts: int
    answered_alike: int
    tokens: int
    agreement: float
    mean_kl: float
    mean_kl_base: float
    largest_gap: float
    gap_bound: float | None
    prompts_tokenized_alike: int
    texts_tokenized_otherwise: list[str]
    ends: list[str]


@torch.inference_mode()
def own_answers(
    base_folder: Path,
    adapter: AdapterFolder,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    stops: list[int],
) -> Answers:
    """Greedy answers of base + adapter, computed by loratune in fp32.

    Args:
        base_folder: the base model's files.
        adapter: as read.
        tokenizer: of the adapted model.
        prompts: token ids.
        stops: every id that ends an answer.
    """
    wrapped = wrap_for_loading(load_model(base_folder, torch.float32), adapter)
    model: Any = wrapped.model.eval()
    sampling, pad = Sampling(NEW_TOKENS), stops[0]
    answers = generate_ids(model, tokenizer, prompts, sampling, pad, stops)
    pairs = list(zip(prompts, answers, strict=True))
    logits = [_answer_logits(model, *pair) for pair in pairs]
    with disabled(wrapped):
        base_logits = [_answer_logits(model, *pair) for pair in pairs]
    return Answers(prompts, answers, logits, base_logits, stops)


def _answer_logits(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
    return logits.float()


@torch.inference_mode()
def prove_answers(
    path: Path,
    own: Answers,
    tokenizer: Tokenizer,
    dtype: GgufDtype | None,
    adapter: Path | None = None,
) -> LlamaCppProof:
    """Ask llama.cpp what loratune answered.

    Args:
        path: the model's GGUF file.
        own: loratune's answers.
        tokenizer: of the adapted model.
        dtype: the file's, where loratune wrote it.
        adapter: an adapter's GGUF file to run on it.

    Raises:
        MergeError: if it tokenizes, stops or answers otherwise.
    """
    name = (adapter or path).name
    texts: Any = tokenizer(list(TEXTS), add_special_tokens=False)
    with running(path, _positions(own), adapter) as model:
        otherwise = _tokenized_otherwise(model, texts["input_ids"])
        if otherwise and adapter is None:
            raise MergeError(f"llama.cpp tokenizes {otherwise[0]!r} otherwise", where=name)
        ends = _require_ends(model, own.stops, tokenizer, name)
        alike = sum(
            model.ids(tokenizer.decode(ids, skip_special_tokens=False), special=True) == ids
            for ids in own.prompts
        )
        theirs = _their_logits(model, own)
    base = own.base_logits
    if adapter is not None:
        with running(path, _positions(own)) as model:
            base = _their_logits(model, own)
    bound = GAPS.get(dtype) if dtype else None
    words = _Words(alike, otherwise, ends)
    proof = _compared(own, theirs, base, bound, words)
    _judge(proof, judged=adapter is not None or bound is not None, name=name)
    return proof


def _positions(own: Answers) -> int:
    return max(len(p) + len(a) for p, a in zip(own.prompts, own.answers, strict=True))


def _their_logits(model: LlamaCpp, own: Answers) -> list[Tensor]:
    return [
        model.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :]
        for prompt, answer in zip(own.prompts, own.answers, strict=True)
    ]


def _tokenized_otherwise(model: LlamaCpp, expected: Sequence[Sequence[int]]) -> list[str]:
    return [
        text
        for text, ids in zip(TEXTS, expected, strict=True)
        if model.ids(text, special=False) != list(ids)
    ]


def _require_ends(
    model: LlamaCpp, stops: Sequence[int], tokenizer: Tokenizer, name: str
) -> list[str]:
    names = tokenizer.convert_ids_to_tokens(list(stops))
    for stop, word in zip(stops, names, strict=True):
        if not model.ends(stop):
            raise MergeError(f"llama.cpp does not stop at '{word}'", where=name)
    return names


class _Words(NamedTuple):
    """How llama.cpp reads text, and at which tokens it stops."""

    prompts_alike: int
    texts_otherwise: list[str]
    ends: list[str]


def _compared(
    own: Answers,
    theirs: Sequence[Tensor],
    bases: Sequence[Tensor],
    bound: float | None,
    words: _Words,
) -> LlamaCppProof:
    kl = kl_base = gap = 0.0
    agreed = same = 0
    for answer, logits, base, other in zip(own.answers, own.logits, bases, theirs, strict=True):
        choice = other.argmax(-1)
        differs = (choice != torch.tensor(answer)).nonzero().flatten().tolist()
        same += not differs
        agreed += len(answer) - len(differs)
        if differs:
            step = differs[0]
            gap = max(gap, float(logits[step, answer[step]] - logits[step, choice[step]]))
        kl += _kl(logits, other)
        kl_base += _kl(logits, base)
    tokens = sum(map(len, own.answers))
    return LlamaCppProof(
        version=version(),
        prompts=len(own.prompts),
        answered_alike=same,
        tokens=tokens,
        agreement=agreed / tokens,
        mean_kl=kl / tokens,
        mean_kl_base=kl_base / tokens,
        largest_gap=gap,
        gap_bound=bound,
        prompts_tokenized_alike=words.prompts_alike,
        texts_tokenized_otherwise=words.texts_otherwise,
        ends=words.ends,
    )


def _kl(own: Tensor, other: Tensor) -> float:
    """Summed KL divergence of (steps, vocabulary)."""
    ours, theirs = own.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((ours.exp() * (ours - theirs)).sum())


def _judge(proof: LlamaCppProof, *, judged: bool, name: str) -> None:
    if proof.gap_bound is not None and not proof.largest_gap <= proof.gap_bound:
        raise MergeError(
            f"llama.cpp chooses another token where loratune's is {proof.largest_gap:.2g} above it",
            where=name,
            fix="nothing was published; report this with the model's config.json",
        )
    if judged and not proof.mean_kl < proof.mean_kl_base:
        raise MergeError(
            f"llama.cpp answers more like the base (KL {proof.mean_kl_base:.2g}) than like the "
            f"adapted model (KL {proof.mean_kl:.2g})",
            where=name,
            fix="nothing was published; report this with the model's config.json",
        )
