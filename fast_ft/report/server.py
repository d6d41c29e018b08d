"""Serves one page on 127.0.0.1, for `data --explore`, until Ctrl-C."""

from __future__ import annotations

import gzip
import secrets
import sys
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fast_ft.common.console import note


def make_server(page: str) -> tuple[ThreadingHTTPServer, str]:
    """Return a server of one page on a free port, and the page's address; serve_forever() starts it.

    Other users of this machine can reach the port too, so the path holds a secret. A page of another site that has
    its name point to 127.0.0.1 (DNS rebinding) shows in the Host header, a script of another site in the Origin header;
    both are refused.
    """
    content = gzip.compress(page.encode(), 1)
    path = f"/{secrets.token_urlsafe(12)}/"

    class Handler(BaseHTTPRequestHandler):
        """Answers with the page, to this machine's browser alone."""

        server_version, sys_version = "fast_ft", ""
        timeout = 30  # seconds that a connection may say nothing

        def do_GET(self) -> None:
            """Send the page, or say why not."""
            names = [f"{name}:{server.server_port}" for name in ("127.0.0.1", "localhost")]
            hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
            if len(hosts) != 1 or hosts[0] not in names:
                self.send_error(421, "this server answers to 127.0.0.1 only")
            elif any(origin not in [f"http://{name}" for name in names] for origin in origins):
                self.send_error(403, "this server answers to its own page only")
            elif self.path != path:
                self.send_error(404)
            else:
                self.send_response(200)
                for name, value in (
                    ("Content-Type", "text/html; charset=utf-8"),
                    ("Content-Encoding", "gzip"),
                    ("Content-Length", str(len(content))),
                    ("Cache-Control", "no-store"),
                    ("Content-Security-Policy", "frame-ancestors 'none'"),
                    ("Cross-Origin-Resource-Policy", "same-origin"),
                    ("Referrer-Policy", "no-referrer"),
                    ("X-Content-Type-Options", "nosniff"),
                ):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing: a line for each request would bury the address."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    return server, f"http://127.0.0.1:{server.server_port}{path}"


def serve(page: str) -> None:
    """Serve the page until Ctrl-C; in a terminal, open it in the browser."""
    server, address = make_server(page)
    note(f"{address}\nCtrl-C stops it.")
    if sys.stderr.isatty():
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        note("stopped")
    finally:
        server.server_close()
