"""A port for a server that cannot choose one itself, or that several processes must know of."""

from __future__ import annotations

import socket

_kept: list[socket.socket] = []


def free_port() -> int:
    """Return a port of 127.0.0.1 that the system gives to nobody who asks for any, as long as this process lives.

    A socket that listens to nobody stays bound to it. Servers may bind it all the same where they set SO_REUSEADDR, as
    asyncio, http.server, libuv (torch's store) and llama.cpp do. Without that socket, any connection made on this
    machine before the server listens could take the port.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    _kept.append(kept)
    port: int = kept.getsockname()[1]
    return port
