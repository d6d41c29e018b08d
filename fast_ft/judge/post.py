"""One HTTP POST whose reply is bounded, in time as a whole and in size, and which goes to the given server alone.

A general client follows redirects with the key in hand, and unpacks whatever a compressed reply grows to. It bounds the
silence between two bytes, and not the exchange: httpx with a timeout of 0.3 s waits as long as a server sends one byte
of its headers now and then. Here the whole exchange has one deadline, no redirect is followed, and at most MOST bytes
are kept, packed or unpacked. One connection carries one request: a judge takes seconds to answer, a handshake tenths.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import io
import socket
import ssl
import time
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from urllib.parse import SplitResult, unquote, urlsplit

MOST = 1 << 20  #: bytes of a reply; one of 400 tokens with all that servers put around it has some thousand


class Unreached(Exception):
    """Nobody took the connection: nothing was sent."""


class Broken(Exception):
    """The connection was lost, or what came over it is not HTTP."""


class TooLong(Exception):
    """The reply has more than MOST bytes."""


@dataclass(frozen=True, slots=True)
class HttpReply:
    """A whole reply, of any status."""

    status: int
    headers: Message
    body: bytes


def post(url: str, body: bytes, headers: dict[str, str], seconds: float) -> HttpReply:
    """Send a body to an http or https URL, by the environment's proxy where it names one, and return the reply.

    Raises TimeoutError where the whole exchange takes longer than `seconds`, and Unreached, Broken and TooLong.
    """
    ends = time.monotonic() + seconds
    connection, target, more = _connection(urlsplit(url), seconds)
    try:
        connection.connect()
    except TimeoutError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unreached(_reason(error)) from None
    with contextlib.closing(connection.sock) as connected:
        connection.sock = _Until(connected, ends)
        try:
            connection.request("POST", target, body, headers | more)
            response = connection.getresponse()
            content = response.read(MOST + 1)
            if len(content) <= MOST and response.length:  # with a length asked for, a reply cut short is no error there
                raise http.client.IncompleteRead(b"", response.length)
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Broken(_reason(error)) from None
    return HttpReply(
        response.status, response.headers, _unpacked(content, response.headers.get("content-encoding", ""))
    )


class _Until:
    """What http.client needs of a connected socket, until a moment; later only what has arrived already is read."""

    def __init__(self, connected: socket.socket, ends: float) -> None:
        self._socket, self._ends = connected, ends

    def sendall(self, content: bytes) -> None:
        """Send all bytes. Raises TimeoutError."""
        self._wait()
        self._socket.sendall(content)

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return a reader of what the server sends. Its reads raise TimeoutError."""

        def fill(buffer: memoryview) -> int:
            """Receive into a buffer, and return how many bytes came."""
            self._wait()
            return self._socket.recv_into(buffer)

        return io.BufferedReader(_Reader(fill))

    def close(self) -> None:
        """Leave it open: http.client closes before it reads a reply that is the connection's last."""

    def _wait(self) -> None:
        # A stopped process that goes on finds its reply here, too late, but paid for.
        self._socket.settimeout(max(0.001, self._ends - time.monotonic()))


class _Reader(io.RawIOBase):
    def __init__(self, fill: Callable[[memoryview], int]) -> None:
        self._fill = fill

    def readable(self) -> bool:
        """Return True, as io asks."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer, and return how many bytes came; 0 at the end."""
        return self._fill(buffer)


def _connection(at: SplitResult, seconds: float) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """Return a connection that is not made yet, what to ask for over it, and further headers."""
    host = at.hostname or ""
    proxies = {} if urllib.request.proxy_bypass(host) else urllib.request.getproxies()
    proxy = proxies.get(at.scheme) or proxies.get("all")
    if not proxy:
        return _direct(at.scheme, host, at.port, seconds), at.path, {}
    by = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if by.scheme != "http" or not by.hostname:
        raise Unreached(f"a proxy of the kind {by.scheme} is not known here; give one that begins with http://")
    login = f"{unquote(by.username or '')}:{unquote(by.password or '')}".encode()
    more = {"Proxy-Authorization": f"Basic {base64.b64encode(login).decode()}"} if by.username else {}
    connection = _direct(at.scheme, by.hostname, by.port or 80, seconds)
    if at.scheme == "http":
        return connection, at.geturl(), more
    connection.set_tunnel(host, at.port or 443, more)
    return connection, at.path, {}


def _direct(scheme: str, host: str, port: int | None, seconds: float) -> http.client.HTTPConnection:
    if scheme == "https":
        return http.client.HTTPSConnection(host, port, timeout=seconds, context=_trusted())
    return http.client.HTTPConnection(host, port, timeout=seconds)


@functools.cache
def _trusted() -> ssl.SSLContext:
    """Return a context that knows the system's authorities, and certifi's, since not every Python finds the former."""
    context = ssl.create_default_context()
    with contextlib.suppress(ImportError):
        import certifi

        context.load_verify_locations(certifi.where())
    return context


def _unpacked(content: bytes, coding: str) -> bytes:
    """Return a body without the compression that nobody asked for; some servers compress all the same."""
    if len(content) > MOST:
        raise TooLong
    if coding.strip().lower() in ("", "identity"):
        return content
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or deflate
    try:
        text = unpacker.decompress(content, MOST + 1)
    except zlib.error:
        raise Broken("it is compressed in a way that is not known here") from None
    if len(text) > MOST:
        raise TooLong
    if not unpacker.eof:
        raise Broken("half of a compressed reply")
    return text


def _reason(error: Exception) -> str:
    """Return a few words. The error's own may hold a header, so only those of the system are taken."""
    said = getattr(error, "strerror", None) or getattr(error, "verify_message", None)
    return said.lower() if isinstance(said, str) else type(error).__name__
