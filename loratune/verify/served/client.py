"""A server's OpenAI-compatible API over HTTP: every way it can fail is one line, in time."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from loratune.errors import ConfigError, LoratuneError, ModelError

_LARGEST = 8 << 20
"""Bytes of an answer: these have kilobytes."""
_SHOWN = 120
_Result = TypeVar("_Result")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A question goes to the server that was named, and to no other."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


@dataclass(frozen=True)
class Client:
    """A server.

    Attributes:
        url: up to ``/v1``, without it.
        timeout: seconds that an answer may take, from the first byte sent to the last received.
    """

    url: str
    timeout: float

    @classmethod
    def at(cls, url: str, timeout: float) -> Client:
        """The server at ``url``, with ``/v1`` at its end or without.

        Raises:
            ConfigError: if it is not a URL of HTTP.
        """
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            fix = "write it as http://HOST:PORT"
            raise ConfigError(f"'{url}' is not a URL of HTTP", where="served", fix=fix)
        return cls(url.rstrip("/").removesuffix("/v1"), timeout)

    def get(self, path: str) -> Any:
        """The JSON under a path."""
        return self._asked(path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that the server answers to ``body``."""
        return self._asked(path, body)

    def _asked(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """One question and its answer.

        Raises:
            StatusError: if the server refuses.
            ModelError: if it does not answer, not in time, or not in JSON.
        """
        where = f"{self.url}{path}"
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(where, data, headers)
        content = _in_time(lambda: self._read(request, where), self.timeout, where)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            shown = content[:_SHOWN].decode(errors="replace")
            raise _unusable(f"the server answers no JSON: {shown!r}", where) from error

    def _read(self, request: urllib.request.Request, where: str) -> bytes:
        opener = urllib.request.build_opener(_NoRedirects)
        try:
            with opener.open(request, timeout=self.timeout) as response:
                content: bytes = response.read(_LARGEST + 1)
        except urllib.error.HTTPError as error:
            raise StatusError(error.code, _reason(error), where) from error
        except TimeoutError as error:
            raise _too_slow(self.timeout, where) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _too_slow(self.timeout, where) from error
            raise _unusable(f"no server answers: {error.reason}", where) from error
        except http.client.HTTPException as error:
            cause = f"what listens there does not speak HTTP ({type(error).__name__})"
            raise _unusable(cause, where) from error
        except (OSError, ValueError) as error:
            raise _unusable(f"the connection broke: {error}", where) from error
        if len(content) > _LARGEST:
            raise _unusable(f"the answer has over {_LARGEST:,} bytes", where)
        return content


class StatusError(ModelError):
    """The server refused a question.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, reason: str, where: str) -> None:
        cause = f"the server refuses with status {status}{reason}"
        super().__init__(cause, where=where, fix="look into the server's log")
        self.status = status


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says about a refusal."""
    try:
        text = error.read(1 << 12).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""
    return f": {' '.join(text.split())[:_SHOWN]}" if text.strip() else ""


def _unusable(cause: str, where: str) -> ModelError:
    return ModelError(cause, where=where, fix="start the server, or set served=URL to it")


def _too_slow(seconds: float, where: str) -> ModelError:
    cause = f"no answer within {seconds:g} seconds"
    return ModelError(cause, where=where, fix="set timeout=SECONDS higher")


def _in_time(work: Callable[[], _Result], seconds: float, where: str) -> _Result:
    """What ``work`` returns: sockets bound each read, not a server that sends a byte a second.

    Raises:
        ModelError: if it is not done in time; it is left behind then.
    """
    done: list[_Result] = []
    failed: list[LoratuneError] = []

    def run() -> None:
        try:
            done.append(work())
        except LoratuneError as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise _too_slow(seconds, where)
    return done[0]
