"""Whether the embedded demo loads with every socket blocked."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from loratune.config.schema import ModelConfig, Precision
from loratune.doctor.finding import Finding, examine
from loratune.errors import SecurityError
from loratune.stages.load import load

_BLOCKED = ("connect", "connect_ex", "sendto")


def check_offline() -> Finding:
    """Load the embedded model and tokenizer without a network."""
    return examine("offline", _load_without_network, "report it with `pip list`")


def _load_without_network() -> str:
    with blocked_sockets():
        base = load(ModelConfig(path="builtin:demo-opt", device="cpu"), Precision.fp32)
        count = sum(parameter.numel() for parameter in base.model.parameters())
        words = base.tokenizer("one two")["input_ids"]
    return f"the demo ({count:,} parameters, {len(words)} tokens) loads without a network"


@contextmanager
def blocked_sockets() -> Iterator[None]:
    """Every attempt of the block to reach the network raises ``SecurityError``."""

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise SecurityError("something tried to reach the network", where="offline check")

    originals = {name: getattr(socket.socket, name) for name in _BLOCKED}
    resolve = socket.getaddrinfo
    try:
        for name in _BLOCKED:
            setattr(socket.socket, name, refuse)
        socket.getaddrinfo = refuse
        yield
    finally:
        for name, method in originals.items():
            setattr(socket.socket, name, method)
        socket.getaddrinfo = resolve
