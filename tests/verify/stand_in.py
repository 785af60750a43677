"""A small OpenAI-compatible server on a loopback port, in this process: a real model behind it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str, dict[str, Any]], tuple[int, bytes]]
"""Path and body to status and bytes."""


@contextmanager
def serving(reply: Reply) -> Iterator[str]:
    """A server on a loopback port; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(*reply(self.path, {}))

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self._send(*reply(self.path, json.loads(self.rfile.read(length))))

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def models(*names: str) -> bytes:
    """What ``/v1/models`` answers."""
    return json.dumps({"object": "list", "data": [{"id": name} for name in names]}).encode()
