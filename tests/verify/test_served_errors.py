"""``verify served=``: a server that is down, slow, or no such server: one line, in time."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.command_line import CommandLine
from support.http_server import serving

from loratune.errors import ConfigError, ModelError
from loratune.runs.golden import Golden, GoldenPrompt, read_golden, write_golden
from loratune.verify.served import verify_served

HOURS = 3600.0
PROMPT = GoldenPrompt("Q", [], 1, "yes", "no", {"yes": [-3.0, -0.1], "no": [-0.1, -3.0]})


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    write_golden(tmp_path / "golden.json", Golden([0.0, 1.0], 4, False, [PROMPT]))
    return tmp_path / "golden.json"


@contextmanager
def talking(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """Something on a port that need not speak HTTP; its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    open_ones: list[socket.socket] = []

    def listen() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            open_ones.append(connection)
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for one in (listener, *open_ones):
            one.close()


def silent(connection: socket.socket) -> None:
    connection.recv(1)
    time.sleep(HOURS)


def byte_by_byte(connection: socket.socket) -> None:
    """An answer that comes for ever, a byte at a time."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n[")
    try:
        while True:
            connection.sendall(b" ")
            time.sleep(0.05)
    except OSError:
        return


def headers_byte_by_byte(connection: socket.socket) -> None:
    try:
        for _ in range(100_000):
            connection.sendall(b"H")
            time.sleep(0.05)
    except OSError:
        return


def another_protocol(connection: socket.socket) -> None:
    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
    connection.close()


def hanging_up(connection: socket.socket) -> None:
    connection.close()


@pytest.mark.parametrize("talk", [silent, byte_by_byte, headers_byte_by_byte])
def test_a_slow_server_is_not_waited_for(
    talk: Callable[[socket.socket], None], golden: Path
) -> None:
    with talking(talk) as url, pytest.raises(ModelError, match=r"no answer within 0\.5 seconds"):
        verify_served(url, golden, timeout=0.5)


@pytest.mark.parametrize("talk", [another_protocol, hanging_up])
def test_a_port_that_does_not_speak_http(
    talk: Callable[[socket.socket], None], golden: Path
) -> None:
    with talking(talk) as url, pytest.raises(ModelError, match=r"speak HTTP|broke|no server"):
        verify_served(url, golden, timeout=20)


def test_a_server_that_is_down(golden: Path, cli: CommandLine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    done = cli("verify", f"served=http://127.0.0.1:{port}", f"golden={golden}", str(golden.parent))
    assert done.code == 4 and len(done.errors) == 1 and not done.has_traceback
    assert "no server answers" in done.last and str(port) in done.last


NONSENSE: dict[str, tuple[bytes, str]] = {
    "a page": (b"<html>welcome</html>", "no JSON"),
    "nothing": (b"", "no JSON"),
    "a list": (b"[1, 2]", "names no models"),
    "a number": (b"7", "names no models"),
    "bytes": (bytes(range(256)), "no JSON"),
    "deep": (b"[" * 100_000, "no JSON"),
    "no models": (b'{"data": []}', "names no models"),
    "strange models": (b'{"data": [1, null]}', "names no models"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_in_place_of_models(name: str, golden: Path) -> None:
    content, words = NONSENSE[name]
    with serving(lambda *_: (200, content)) as url, pytest.raises(ModelError, match=words) as said:
        verify_served(url, golden, timeout=20)
    assert len(said.value.lines()) == 1


ANSWERS = [
    {}, [], {"choices": []}, {"choices": [{}]}, {"choices": [{"text": None}]}, {"choices": "x"},
    {"choices": [{"message": {}}]}, {"choices": [{"text": "x"}], "usage": 7}, {"error": "no"}, None,
]  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS, ids=json.dumps)
def test_nonsense_in_place_of_a_completion(answer: object, golden: Path) -> None:
    def reply(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        return 200, json.dumps(answer if body else {"data": [{"id": "m"}]}).encode()

    with serving(reply) as url, pytest.raises(ModelError, match="else than a completion"):
        verify_served(url, golden, timeout=20)


LOGPROBS = [
    7, "x", [], {}, {"top_logprobs": None}, {"top_logprobs": [None]},
    {"top_logprobs": [{"a": "b"}]},
    {"content": [{}]}, {"content": [{"top_logprobs": [{"token": "x"}]}]}, {"content": 3},
]  # fmt: skip


@pytest.mark.parametrize("logprobs", LOGPROBS, ids=json.dumps)
def test_strange_log_probabilities_count_as_none(logprobs: object, golden: Path) -> None:
    def reply(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        answer = {"choices": [{"text": " yes ", "logprobs": logprobs}]}
        return 200, json.dumps(answer if body else {"data": [{"id": "m"}]}).encode()

    with serving(reply) as url:
        result = verify_served(url, golden, timeout=20)
    assert result.problems == [] and "1 of 1 answers" in result.checks[0].what


@pytest.mark.parametrize("status", [301, 401, 429, 500, 503])
def test_a_refusal_says_its_status(status: int, golden: Path) -> None:
    with serving(lambda *_: (status, b"over there")) as url, pytest.raises(ModelError) as said:
        verify_served(url, golden, timeout=20)
    assert f"status {status}: over there" in str(said.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "file:///etc/passwd", ""])
def test_what_is_not_a_url_of_http(url: str, golden: Path) -> None:
    with pytest.raises(ConfigError, match="not a URL of HTTP"):
        verify_served(url, golden)


def test_golden_prompts_that_are_missing_or_were_changed(golden: Path) -> None:
    with pytest.raises(ConfigError, match="evaluate run="):
        read_golden(golden.with_name("none.json"))
    golden.write_text(golden.read_text().replace("yes", "yea"))
    with pytest.raises(ModelError, match="golden prompts are unreadable"):
        read_golden(golden)


SETTINGS = {
    "served=http://x target=vllm": "two questions",
    "served=http://x model.path=.": "no effect",
    "timeout=3": "no effect",
    "target=vlm": "did you mean 'vllm'",
    "served=http://x timeout=0": "number of seconds",
    "served=http://x timeout=nan": "number of seconds",
}


@pytest.mark.parametrize("words", SETTINGS)
def test_settings_that_do_not_go_together(words: str, cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("{}")
    done = cli("verify", str(tmp_path), *words.split())
    assert done.code == 2 and SETTINGS[words] in done.last, done.err
