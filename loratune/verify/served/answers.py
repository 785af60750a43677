"""What a server says to a golden prompt: its greedy answer, and the first token's distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratune.errors import ConfigError, ModelError
from loratune.runs.golden import GoldenPrompt
from loratune.verify.served.client import Client, StatusError

TOP = 5
"""Tokens whose log-probabilities are asked for: what servers give at most unless told."""
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_UNKNOWN = (404, 405, 501)


@dataclass(frozen=True)
class ServedAnswer:
    """One answer.

    Attributes:
        text: of the greedy answer.
        first: text of a token to its log-probability as the first one; empty if not told.
        tokens: of the prompt as the server wrote it; ``None`` if not told.
    """

    text: str
    first: dict[str, float]
    tokens: int | None


def served_model(client: Client, chosen: str | None) -> str:
    """The model to ask for, as the server calls it.

    Raises:
        ConfigError: if the server has several and none is chosen, or not the chosen one.
    """
    listed = client.get("/v1/models")
    data = listed.get("data") if isinstance(listed, dict) else None
    names = [str(one.get("id")) for one in data or [] if isinstance(one, dict)]
    if not names:
        raise _nonsense("names no models", client, "/v1/models")
    if chosen is None and len(names) == 1:
        return names[0]
    if chosen in names:
        return str(chosen)
    cause = "the server has several models" if chosen is None else f"no model '{chosen}' there"
    fix = f"set served_model to one of {', '.join(names)}"
    raise ConfigError(cause, where="served_model", fix=fix)


def ask_as_text(
    client: Client, model: str, prompts: Sequence[GoldenPrompt], longest: int
) -> list[ServedAnswer] | None:
    """Answers to the prompts as training wrote them; ``None`` where text is not completed there."""
    options = {"model": model, "max_tokens": longest, "temperature": 0, "logprobs": TOP}
    bodies = [{**options, "prompt": prompt.text} for prompt in prompts]
    return _all(client, COMPLETIONS, bodies, ("logprobs",))


def ask_as_chat(
    client: Client, model: str, prompts: Sequence[GoldenPrompt], longest: int
) -> list[ServedAnswer] | None:
    """Answers to the prompts as conversations; ``None`` where the server holds none."""
    options = {
        "model": model,
        "max_tokens": longest,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": TOP,
    }
    bodies = [{**options, "messages": prompt.messages} for prompt in prompts]
    return _all(client, CHAT, bodies, ("logprobs", "top_logprobs"))


def _all(
    client: Client, path: str, bodies: Sequence[Mapping[str, Any]], optional: Sequence[str]
) -> list[ServedAnswer] | None:
    """Answers to all questions, without log-probabilities where the server refuses them."""
    answers: list[ServedAnswer] = []
    dropped: Sequence[str] = ()
    for body in bodies:
        try:
            reply = client.post(path, _without(body, dropped))
        except StatusError as error:
            if error.status in _UNKNOWN:
                return None
            if dropped or error.status not in (400, 422, 500):
                raise
            dropped = optional
            reply = client.post(path, _without(body, dropped))
        answers.append(_answer(reply, client, path))
    return answers


def _without(body: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in keys}


def _answer(reply: Any, client: Client, path: str) -> ServedAnswer:
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        if not isinstance(text, str):
            raise TypeError("an answer is text")
        usage = reply.get("usage") or {}
        tokens = usage.get("prompt_tokens")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _nonsense("answers with something else than a completion", client, path) from error
    first = _first(choice.get("logprobs"))
    return ServedAnswer(text, first, tokens if isinstance(tokens, int) else None)


def _first(logprobs: Any) -> dict[str, float]:
    """The first token's log-probabilities, as completions or as chat spells them."""
    try:
        if logprobs.get("content"):
            tokens = logprobs["content"][0]["top_logprobs"]
            return {str(one["token"]): float(one["logprob"]) for one in tokens}
        return {str(text): float(value) for text, value in logprobs["top_logprobs"][0].items()}
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        return {}


def _nonsense(what: str, client: Client, path: str) -> ModelError:
    fix = "set served=URL to an OpenAI-compatible server"
    return ModelError(f"the server {what}", where=f"{client.url}{path}", fix=fix)
