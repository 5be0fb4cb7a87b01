"""A server on this machine, for everything that calls one: remote rewards, judges, sandbox services."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

# Of the number (from 1) and the body of a request: a status and a text, or its parts, some of them made when their turn comes;
# None hangs up.
Answer = Callable[[int, Any], tuple[int, str | list[str | Callable[[], bytes]]] | None]


@dataclass(frozen=True, kw_only=True)
class Request:
    path: str
    body: Any
    authorization: str | None


class Server(ThreadingHTTPServer):
    """Answers every POST by what the test says; remembers what it got."""

    daemon_threads = False  # so that closing waits for them, and no later test finds their sockets

    def __init__(self, answer: Answer, headers: dict[str, str]):
        self.answer, self.headers = answer, headers
        self.seen: list[Request] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        assert isinstance(server, Server)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.seen.append(Request(path=self.path, body=body, authorization=self.headers.get("Authorization")))
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            number = len(server.seen)
        said = server.answer(number, body)
        with server.lock:
            server.under_way -= 1
        if said is None:
            return
        status, text = said
        self.send_response(status)
        for header in server.headers.items():
            self.send_header(*header)
        self.end_headers()
        try:
            for part in text if isinstance(text, list) else [text]:
                self.wfile.write(part.encode() if isinstance(part, str) else part())
                self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):  # it was too late
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """A function (answer, **headers) -> a server that runs until the test ends."""
    servers: list[Server] = []

    def start(answer: Answer, **headers: str) -> Server:
        servers.append(Server(answer, headers))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
