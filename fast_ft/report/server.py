"""Serves one page on 127.0.0.1, for `data --explore` and `watch`, until Ctrl-C, and answers what the page asks."""

from __future__ import annotations

import contextlib
import gzip
import json
import secrets
import sys
import webbrowser
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fast_ft.common.console import note
from fast_ft.report.html import finite

#: Takes the JSON that the page sends, and gives the JSON that goes back.
Answer = Callable[[Any], Any]
MOST_ASKED = 100_000  #: bytes of a question
_HEADERS = (
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", "frame-ancestors 'none'"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
)


class PageServer(ThreadingHTTPServer):
    """A server of one page on a free port of 127.0.0.1; serve_forever() starts it.

    Other users of this machine can reach the port too, so the path holds a secret. A page of another site that has
    its name point to 127.0.0.1 (DNS rebinding) shows in the Host header, a script of another site in the Origin header;
    both are refused.
    """

    daemon_threads = True

    def __init__(self, page: str, answer: Answer | None = None) -> None:
        """answer: answers what the page asks, as JSON by POST; without it the page asks nothing."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = gzip.compress(page.encode(), 1)
        self.path = f"/{secrets.token_urlsafe(12)}/"
        self.answer = answer

    @property
    def address(self) -> str:
        """The page's address, secret path included."""
        return f"http://127.0.0.1:{self.server_port}{self.path}"


class _Handler(BaseHTTPRequestHandler):
    """Answers with the page, to this machine's browser alone."""

    server: PageServer
    server_version, sys_version = "fast_ft", ""
    timeout = 30  # seconds that a connection may say nothing

    def do_GET(self) -> None:
        """Send the page, or say why not."""
        if self.allowed():
            self.send("text/html; charset=utf-8", self.server.content)

    def do_POST(self) -> None:
        """Answer the page's question, or say why not. A browser gives the Origin of each of them."""
        length, kind = self.headers.get("Content-Length", ""), self.headers.get("Content-Type")
        if not self.allowed():
            return
        if self.server.answer is None or kind != "application/json" or not self.headers.get("Origin"):
            self.send_error(403, "this server answers to its own page only")
        elif not length.isdecimal() or int(length) > MOST_ASKED:
            self.send_error(413)
            self.pass_over(int(length) if length.isdecimal() else 0)
        elif (question := _read(self.rfile.read(int(length)))) is None:
            self.send_error(400, "no JSON")
        else:
            told = json.dumps(finite(self.server.answer(question)), allow_nan=False).encode()
            self.send("application/json", gzip.compress(told, 1))

    def pass_over(self, length: int) -> None:
        """Read a body that is not wanted: a client that is still sending when its connection ends sees no reply."""
        left = min(length, 100 * MOST_ASKED)
        with contextlib.suppress(OSError):
            while left > 0 and (piece := self.rfile.read(min(left, MOST_ASKED))):
                left -= len(piece)

    def allowed(self) -> bool:
        """Return whether this machine's browser asks for the page itself; else say why not."""
        names = [f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")]
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if len(hosts) != 1 or hosts[0] not in names:
            self.send_error(421, "this server answers to 127.0.0.1 only")
        elif any(origin not in [f"http://{name}" for name in names] for origin in origins):
            self.send_error(403, "this server answers to its own page only")
        elif self.path != self.server.path:
            self.send_error(404)
        else:
            return True
        return False

    def send(self, kind: str, packed: bytes) -> None:
        """Send gzip'd content."""
        self.send_response(200)
        more = (("Content-Type", kind), ("Content-Encoding", "gzip"), ("Content-Length", str(len(packed))))
        for name, value in (*more, *_HEADERS):
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the browser has gone on to something else
            self.wfile.write(packed)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: a line for each request would bury the address."""


def serve(page: str, answer: Answer | None = None) -> None:
    """Serve the page until Ctrl-C, answering what it asks; in a terminal, open it in the browser."""
    server = PageServer(page, answer)
    try:
        note(f"{server.address}\nCtrl-C stops it.")
        if sys.stderr.isatty():
            webbrowser.open(server.address)
        server.serve_forever()
    except KeyboardInterrupt:
        note("stopped")
    finally:
        server.server_close()


def _read(body: bytes) -> Any:
    """Return the JSON of a request, or None where it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
