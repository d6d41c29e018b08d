"""A tokenizer's own chat template, rendered in a process of its own: it is a program that comes from outside.

Jinja's sandbox keeps a template away from Python. It does not stop an endless loop or a text of terabytes. So
data/jinja_worker.py renders the template: without this process's environment (which holds keys), unable to open a
file, and ended when it takes more than SECONDS or MEMORY.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fast_ft.common.errors import InputError

MOST_CHARACTERS = 200_000  #: of a template; those with tools have some thousands
SECONDS = 10.0  #: for one text; a thousandth of a second is usual
START = 120.0  #: seconds for the process to begin; it reads Python and Jinja from the disk, usually in a tenth of one
MEMORY = 1 << 30  #: bytes of address space
_PROGRAM = Path(__file__).with_name("jinja_worker.py")
_PASSED = ("PATH", "SYSTEMROOT", "LANG", "LC_ALL", "TZ")  #: environment variables that the process gets
_REMEDY = "Use model.template: llama-2."


class SandboxedTemplate:
    """One compiled template in its own process, which ends with this object. `name` stands for it in messages."""

    def __init__(self, source: str, name: str) -> None:
        self.name = name
        if len(source) > MOST_CHARACTERS:
            raise InputError(
                f"{name}: its chat template has {len(source):,} characters; at most {MOST_CHARACTERS:,} are read. "
                f"{_REMEDY}"
            )
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), str(MEMORY)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={key: os.environ[key] for key in _PASSED if key in os.environ},
        )  # fmt: skip
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self._replies), daemon=True).start()
        self.close = weakref.finalize(self, _end, self._process)
        self._wait_for_start()
        self._ask({"source": source})

    def render(self, messages: Sequence[Mapping[str, Any]], **values: Any) -> str:
        """Return the text. Raises InputError where the template fails, refuses the messages, or takes too much."""
        return self._ask({"messages": messages, **values})

    def _wait_for_start(self) -> None:
        """Wait until the process takes requests: its start, slow on a busy machine, is no part of a template's time."""
        line = b""
        with contextlib.suppress(queue.Empty):
            line = self._replies.get(timeout=START)
        if not line:
            self._replies.put(line)  # as where it ends later

    def _ask(self, request: dict[str, Any]) -> str:
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._replies.get(timeout=SECONDS)
        except (OSError, ValueError, queue.Empty):  # ValueError: closed before
            line = b""
        if not line:
            self.close()
            raise InputError(
                f"{self.name}: its chat template took more than {SECONDS:g} s or {MEMORY >> 20:,} MiB. {_REMEDY}"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise InputError(f"{self.name}: its chat template {reply['error']}. {_REMEDY}")
        return reply["text"]


def _read(stream: Any, replies: queue.SimpleQueue[bytes]) -> None:
    for line in stream:
        replies.put(line)
    replies.put(b"")  # the process has ended


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError, AttributeError):
            stream.close()  # type: ignore[union-attr]
