"""Whether a server serves a run's adapted model: asked, not believed.

    loratune verify served=http://127.0.0.1:8000 run=DIR

The server answers the run's golden prompts, as text and as conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loratune.runs.golden import Golden, read_golden
from loratune.verify.checks import Check, Verification
from loratune.verify.served.answers import (
    ServedAnswer,
    ask_as_chat,
    ask_as_text,
    served_model,
)
from loratune.verify.served.client import Client
from loratune.verify.served.judgement import Judgement, Served, judge

__all__ = ["verify_served"]

_RECORD = "golden.json"
_CHAT = "{} golden prompts as conversations"
_SLACK = 1
"""Tokens by which counts of a prompt may differ: a start token more or less."""
_FIXES = {
    Served.base: "load the adapter into the server, and name it with served_model=NAME",
    Served.scale: "serve the export of format=portable, whose scaling is in its numbers",
    Served.other: "serve this run's adapter",
}


def verify_served(
    url: str, golden_file: Path, chosen: str | None = None, timeout: float = 60.0
) -> Verification:
    """Ask a server a run's golden prompts.

    Args:
        url: of an OpenAI-compatible server.
        golden_file: the run's golden prompts.
        chosen: the model to ask for, where the server has several.
        timeout: seconds for one answer.

    Raises:
        ConfigError: if the run has no golden prompts, or the URL or the model is unusable.
        ModelError: if the server does not answer, not in time, or not as such servers do.
    """
    client, golden = Client.at(url, timeout), read_golden(golden_file)
    model = served_model(client, chosen)
    prompts, longest = golden.prompts, golden.max_new_tokens
    texts = ask_as_text(client, model, prompts, longest)
    as_text = _text_check(golden, texts)
    asks_chat = golden.chat and all(prompt.messages for prompt in prompts)
    if as_text.problem:  # of the wrong model, the template says nothing
        as_chat = Check(_RECORD, _CHAT.format(len(prompts)), note="not asked of another model")
    else:
        chats = ask_as_chat(client, model, prompts, longest) if asks_chat else None
        as_chat = _chat_check(golden, chats, texts, asks_chat=asks_chat)
    checks = [as_text, as_chat]
    return Verification(f"served model '{model}' at {url}", golden_file.parent, checks)


def _text_check(golden: Golden, texts: Sequence[ServedAnswer] | None) -> Check:
    what = f"{len(golden.prompts)} golden prompts as text"
    if texts is None:
        return Check(_RECORD, what, note="the server completes no text")
    return _check(what, judge(golden, texts))


def _check(what: str, judgement: Judgement) -> Check:
    if judgement.served is Served.adapted:
        return Check(_RECORD, f"{what} ({judgement.detail})")
    if judgement.served is Served.unclear:
        return Check(_RECORD, what, note=f"cannot be told: {judgement.detail}")
    problem = f"the server serves {judgement.served} ({judgement.detail})"
    return Check(_RECORD, what, problem, fix=_FIXES[judgement.served])


def _chat_check(
    golden: Golden,
    chats: Sequence[ServedAnswer] | None,
    texts: Sequence[ServedAnswer] | None,
    *,
    asks_chat: bool,
) -> Check:
    what = _CHAT.format(len(golden.prompts))
    if not asks_chat:
        more = "their turns have more than role and content"
        return Check(_RECORD, what, note=more if golden.chat else "they are not conversations")
    if chats is None:
        return Check(_RECORD, what, note="the server holds no conversations")
    judgement = judge(golden, chats)
    right_weights = texts is not None and judge(golden, texts).served is Served.adapted
    lengths = _other_lengths(golden, chats, texts)
    if right_weights and (lengths or judgement.served not in (Served.adapted, Served.unclear)):
        shown = lengths or judgement.detail
        problem = f"the server writes conversations with another template ({shown})"
        return Check(_RECORD, what, problem, fix="give the server the chat template of training")
    doubted = judgement.served in (Served.other, Served.unclear)
    if texts is None and doubted and (lengths or judgement.served is Served.other):
        shown = lengths or judgement.detail
        problem = f"the server serves {Served.other}, or with another template ({shown})"
        return Check(_RECORD, what, problem, fix=_FIXES[Served.other])
    return _check(what, judgement)


def _other_lengths(
    golden: Golden, chats: Sequence[ServedAnswer], texts: Sequence[ServedAnswer] | None
) -> str:
    """How many tokens conversations have there and in training, where that differs; else empty.

    Not believed of a server that counts the same prompts as text otherwise.
    """
    own = [prompt.tokens for prompt in golden.prompts]
    counted = own if texts is None else [answer.tokens for answer in texts]
    pairs = zip(counted, own, strict=True)
    if any(there is None or abs(there - here) > _SLACK for there, here in pairs):
        return ""
    for there, here in zip((answer.tokens for answer in chats), own, strict=True):
        if there is not None and abs(there - here) > _SLACK:
            return f"a prompt of {here} tokens has {there} there"
    return ""
