"""A judge's endpoint on loopback that fails as it is told, and counts what it was asked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.helpers.patience import PATIENCE

#: (the request's place among all, from 0; how often this content was asked before; its text) -> a fault's name, or ""
Faults = Callable[[int, int, str], str]
PACKED = {"Content-Encoding": "gzip"}


class JudgeServer:
    """`times` and `keys`: one entry a request; `most_at_once`: how many requests waited for their replies, at most.

    `before_reply` is called with a request's place, in its own thread, while the request waits for its reply: a test
    lets it wait for an event, where a pause of some milliseconds would only make an order of things likely.
    """

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.asked: Counter[str] = Counter()
        self._answered: Counter[str] = Counter()
        self.seen: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.times: list[tuple[float, str]] = []
        self.keys: set[str] = set()
        self.most_at_once = self._at_once = 0
        self.lock = threading.Lock()
        self.before_reply: Callable[[int], object] = lambda place: None
        self.over = threading.Event()

    @property
    def answered(self) -> Counter[str]:
        """Contents that got a whole reply, each with how often."""
        with self.lock:
            return self._answered.copy()

    def gather(self, count: int) -> None:
        """Reply to none of the next requests until `count` of them wait for their replies at the same time."""
        together, until = threading.Barrier(count), self.requests + count
        self.before_reply = lambda place: together.wait(PATIENCE) if place < until else None

    @property
    def requests(self) -> int:
        """The number of requests so far."""
        return len(self.times)

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Serve, and give the address."""
        outer = self

        class Handler(_Handler):
            owner = outer

        server = _Server(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            self.over.set()
            server.shutdown()
            server.server_close()


def scores_for(text: str) -> tuple[int, int]:
    """The two scores that the server gives what it is asked: any, but the same each time."""
    digest = hashlib.sha256(text.encode()).digest()
    return 6 + digest[0] % 5, 1 + digest[1] % 9


def completion(content: str | None, finish: str = "stop", **message: Any) -> str:
    """A fault: a whole reply with this content, this finish_reason, and more in its message."""
    said = {"role": "assistant", "content": content, **message}
    return "raw " + json.dumps({"model": "m", "choices": [{"index": 0, "finish_reason": finish, "message": said}]})


def _as_asked(fault: str, body: dict[str, Any]) -> str:
    """What "reasoning model" and "thinker" say to a request's form; another fault is left as it is.

    The words are those of OpenAI's models that reason. A thinker takes any form, and thinks for 1,000 tokens.
    """
    if fault == "thinker":
        room = max(body.get("max_tokens", 0), body.get("max_completion_tokens", 0))
        return completion("9 7\nSo.") if room > 1000 else completion(None, "length", reasoning_content="8 8, or")
    if fault != "reasoning model":
        return fault
    if "max_tokens" in body:
        said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
        return "error 400 " + json.dumps({"message": said, "param": "max_tokens", "code": "unsupported_parameter"})
    if "temperature" in body:
        said = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is."
        return "error 400 " + json.dumps({"message": said, "param": "temperature", "code": "unsupported_value"})
    return ""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # of 5, the eighth connection at once may wait for a second


class _Handler(BaseHTTPRequestHandler):
    owner: JudgeServer

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        """Note the request, and reply as the fault says."""
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with owner.lock:
            place = len(owner.times)
            fault = owner.faults(place, owner.asked[text], text)
            owner.asked[text] += 1
            owner.seen.append(text)
            owner.bodies.append(body)
            owner.times.append((time.monotonic(), fault))
            owner.keys.add(self.headers.get("Authorization", ""))
            owner._at_once += 1
            owner.most_at_once = max(owner.most_at_once, owner._at_once)
        owner.before_reply(place)
        with owner.lock:  # before the reply: a client that has all of it may ask again before this thread goes on
            owner._at_once -= 1
        with contextlib.suppress(OSError):
            self._reply(_as_asked(fault, body), text)

    def _reply(self, fault: str, text: str) -> None:
        kind, _, value = fault.partition(" ")
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if kind == "drop":
            self.connection.close()
        elif kind == "status":  # with the key in it, as some proxies do
            error = {"error": {"message": f"Incorrect API key provided: {key}", "code": None}}
            self._send(int(value), json.dumps(error))
        elif kind == "429":
            self._send(429, '{"error": {"message": "slow down"}}', {"Retry-After": value} if value else {})
        elif kind == "half":
            whole = self._completion("8 7\nfine")
            self._send(200, whole[: len(whole) // 2], {"Content-Length": str(len(whole))})
            self.connection.close()
        elif kind == "nonsense":
            self._send(200, "<html>welcome</html>", {"Content-Type": "text/html"})
        elif kind == "empty":
            self._send(200, "")
        elif kind == "slow":
            self.owner.over.wait(float(value))
        elif kind == "drip":  # a whole reply, a byte at a time
            self._drip(self._head(200, 500), self._completion("8 7").ljust(500).encode(), float(value))
        elif kind == "drip-head":
            self._drip(b"", self._head(200, 5), float(value))
        elif kind == "flood":
            self.wfile.write(self._head(200, 1 << 40))
            while True:
                self.wfile.write(b" " * (1 << 20))
        elif kind == "gzip":  # of this number of MiB
            packer = zlib.compressobj(1, wbits=zlib.MAX_WBITS | 16)
            pieces = [self._completion("8 7").encode(), *[b" " * (1 << 20)] * int(value)]
            self._send(200, b"".join(map(packer.compress, pieces)) + packer.flush(), PACKED)
        elif kind == "to":
            self._send(307, "", {"Location": value})
        elif kind == "error":  # a status and a JSON error
            status, _, said = value.partition(" ")
            self._send(int(status), json.dumps({"error": json.loads(said)}))
        elif kind == "raw":
            self._send(200, value)
        elif kind == "say":
            self._answer(text, value.replace("KEY", key))
        else:
            first, second = scores_for(text)
            alone = "score of answer 2" not in text and "score of assistant 2" not in text
            self._answer(text, f"{second}\nAlone." if alone else f"{first} {second}\nThe first says more.")

    def _drip(self, before: bytes, content: bytes, every: float) -> None:
        self.wfile.write(before)
        for place in range(len(content)):
            self.wfile.write(content[place : place + 1])
            if self.owner.over.wait(every):
                return

    def _head(self, status: int, length: int) -> bytes:
        return f"HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()

    def _answer(self, text: str, reply: str) -> None:
        with self.owner.lock:  # a client that has its reply finds the reply counted
            self._send(200, self._completion(reply))
            self.owner._answered[text] += 1

    def _completion(self, reply: str) -> str:
        return json.dumps(
            {
                "id": "x", "object": "chat.completion", "created": 0, "model": "judge-2026-01-01",
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
            }
        )  # fmt: skip

    def _send(self, status: int, body: str | bytes, headers: dict[str, str] | None = None) -> None:
        content = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content))}.items():
            if name not in (headers or {}):
                self.send_header(name, value)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
