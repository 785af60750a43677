"""An OpenAI-compatible server with a real model behind it, and golden prompts of that model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loratune.adapters.registry import config_class
from loratune.config.schema import DataConfig, TargetsConfig
from loratune.data.prepare import PreparedData, prepare_data
from loratune.data.tokenizing import RowTokenizer
from loratune.generation import Sampling, generate_answers, stop_ids
from loratune.models.load import load_model, load_tokenizer
from loratune.runs.golden import Golden
from loratune.stages.golden import golden_prompts
from loratune.surgery import WrappedModel, disabled, wrap_model

DEMO = Path(__file__).parents[2] / "loratune" / "assets" / "demo-opt"
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
OTHER_CHAT = (
    "You are a pirate.\n{% for m in messages %}[{{ m.role }}] {{ m.content }} [/{{ m.role }}]\n"
    "{% endfor %}"
)
QUESTIONS = [
    f"Which {what} is {town} known for?"
    for what in ("dish", "song")
    for town in ("Halney", "Gristad", "Velm", "Ostrow", "Pell", "Tarn")
]
LONGEST = 8


def adapted_model(seed: int = 1, size: float = 0.15) -> WrappedModel:
    """The embedded model with random factors that change its answers."""
    config = config_class("lora")(rank=4)
    model = load_model(DEMO, torch.float32)
    wrapped = wrap_model(model, config, TargetsConfig(modules="all_linear"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    wrapped.model.eval()
    return wrapped


def rounded_to_blocks(wrapped: WrappedModel, levels: int = 15) -> WrappedModel:
    """Base weights rounded in blocks of 32, as formats of four bits do."""
    with torch.no_grad():
        for parameter in wrapped.model.parameters():
            if parameter.requires_grad or parameter.dim() != 2 or parameter.shape[1] % 32:
                continue
            blocks = parameter.reshape(-1, 32)
            low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
            step = (high - low).clamp_min(1e-12) / levels
            parameter.copy_((((blocks - low) / step).round() * step + low).reshape_as(parameter))
    return wrapped


def conversations(folder: Path, tokenizer: Any) -> PreparedData:
    """Rows that ask ``QUESTIONS`` as conversations, in a file in ``folder``."""
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Aye."}]}
        for text in QUESTIONS
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare_data(DataConfig(eval_path=str(path)), tokenizer, 10_000, 0)


def chat_tokenizer(folder: Path) -> Any:
    """The embedded model's tokenizer with a chat template."""
    base = folder / "base"
    if not base.is_dir():
        shutil.copytree(DEMO, base)
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = CHAT
    return tokenizer


def recorded(wrapped: WrappedModel, tokenizer: Any, data: PreparedData) -> Golden:
    """The golden prompts of a model."""
    base = answers(wrapped, tokenizer, data, base=True)
    both = list(zip(base, answers(wrapped, tokenizer, data), strict=True))
    golden = golden_prompts(wrapped, tokenizer, data, both, LONGEST)
    assert golden is not None
    return golden


def answers(
    wrapped: WrappedModel, tokenizer: Any, data: PreparedData, *, base: bool = False
) -> list[str]:
    """Greedy answers to all prompts."""
    prompts = [prompt.prompt_ids for prompt in data.prompts]
    stops = stop_ids(wrapped.model, tokenizer, data.answer_format)
    pad_id = RowTokenizer(tokenizer).pad_id

    def answered() -> list[str]:
        sampling = Sampling(LONGEST)
        return generate_answers(wrapped.model, tokenizer, prompts, sampling, pad_id, stops)

    if not base:
        return answered()
    with disabled(wrapped):
        return answered()


@dataclass
class ModelServer:
    """Answers completions and chats with a model, as its settings say.

    Attributes:
        wrapped: the model.
        tokenizer: writes and reads its tokens.
        template: of conversations.
        names: models that it lists.
        logprobs: whether it tells log-probabilities; ``refuses`` answers 400 where asked for them.
        paths: what it has beside the list of models.
    """

    wrapped: WrappedModel
    tokenizer: Any
    template: str = CHAT
    names: tuple[str, ...] = ("model",)
    logprobs: str = "tells"
    paths: tuple[str, ...] = ("/v1/completions", "/v1/chat/completions")
    change: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda reply: reply)

    def reply(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        if path == "/v1/models":
            listed = {"object": "list", "data": [{"id": name} for name in self.names]}
            return 200, json.dumps(listed).encode()
        if path not in self.paths:
            return 404, b'{"error": "not found"}'
        asked = json.loads(body)
        if asked.get("logprobs") and self.logprobs == "refuses":
            return 400, b'{"error": "logprobs are not supported"}'
        is_chat = "messages" in asked
        text = self._written(asked["messages"]) if is_chat else asked["prompt"]
        return 200, json.dumps(self.change(self._answer(text, asked, is_chat=is_chat))).encode()

    def _written(self, messages: list[dict[str, str]]) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, add_generation_prompt=True, tokenize=False
            )
        )

    def _answer(self, text: str, asked: dict[str, Any], *, is_chat: bool) -> dict[str, Any]:
        writer = RowTokenizer(self.tokenizer)
        ids = writer.opening_ids([text])[0]
        sampling = Sampling(asked["max_tokens"])
        stops = stop_ids(self.wrapped.model, self.tokenizer, None)
        (answer,) = generate_answers(
            self.wrapped.model, self.tokenizer, [ids], sampling, writer.pad_id, stops
        )
        choice: dict[str, Any] = {"text": answer}
        if is_chat:
            choice = {"message": {"role": "assistant", "content": answer}}
        if asked.get("logprobs") and self.logprobs == "tells":
            choice["logprobs"] = self._first(ids, is_chat=is_chat)
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    @torch.inference_mode()
    def _first(self, ids: list[int], *, is_chat: bool) -> dict[str, Any]:
        scores = self.wrapped.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(5)
        pairs = zip(scores.indices.tolist(), scores.values.tolist(), strict=True)
        top = {self.tokenizer.decode([token]): value for token, value in pairs}
        if not is_chat:
            return {"top_logprobs": [top]}
        tokens = [{"token": text, "logprob": value} for text, value in top.items()]
        return {"content": [{"top_logprobs": tokens}]}
