"""Tables of documents that compare fast_ft with other libraries, from the newest result of each kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from bench import decode_figures, figures, peer_figures


def newest(pattern: str) -> dict[str, Any] | None:
    """Return the newest result in bench/results/ whose file is named so; None where there is none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in figures.RESULTS.glob(pattern)]
    return max(found, key=lambda result: str(result["date"]), default=None)


def peers() -> str:
    """Return the README's table of training."""
    return peer_figures.readme(newest("peers-*.json"))


def ways() -> str:
    """Return every setting of every way of training that was tried, with its rate."""
    result = newest("peers-*.json")
    return peer_figures.markdown(result).rstrip() if result else peer_figures.readme(None)


def answers() -> str:
    """Return every setting of every way of answering that was tried, with its rate in each run."""
    return decode_figures.markdown(newest("decode-peers-*.json"))


def answering() -> str:
    """Return the README's table of answering."""
    return decode_figures.readme(newest("decode-peers-*.json"))


TABLES: dict[str, Callable[[], str]] = {"peers": peers, "ways": ways, "answering": answering, "answers": answers}
