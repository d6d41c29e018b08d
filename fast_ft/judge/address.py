"""Where a judge model is asked: OPENAI_BASE_URL and OPENAI_API_KEY, from the environment only."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from fast_ft.common.errors import InputError

OPENAI = "https://api.openai.com/v1"


def read() -> tuple[str, str | None]:
    """Return (URL, key) from the environment; InputError where the URL is none, or the key cannot stand in a header.

    The key is None where it is not set. No message holds it.
    """
    url = (os.environ.get("OPENAI_BASE_URL") or OPENAI).strip().rstrip("/")
    try:
        parts = urlsplit(url)
        no_port = parts.port == 0
    except ValueError:  # of a bracket without its other half, of a port beyond 65535
        raise InputError(f"OPENAI_BASE_URL: {url!r} is no address. Write it like http://127.0.0.1:8080/v1") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError(
            "OPENAI_BASE_URL: it holds more than an address. Write https://host/v1, the key in OPENAI_API_KEY"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or no_port or not re.fullmatch(r"[!-~]+", url):
        raise InputError(f"OPENAI_BASE_URL: {url!r} is no address. Write it like http://127.0.0.1:8080/v1")
    key = os.environ.get("OPENAI_API_KEY", "").strip() or None
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise InputError("OPENAI_API_KEY: it holds spaces, line breaks or letters outside ASCII; set it again")
    return url, key


def require_key() -> None:
    """Raise InputError where OpenAI itself would be asked without a key; a server of one's own may need none."""
    url, key = read()
    if key is None and "OPENAI_BASE_URL" not in os.environ:
        raise InputError(
            f"OPENAI_API_KEY: not set. judge.kind: openai asks {url}: export OPENAI_API_KEY=... for it, or "
            "OPENAI_BASE_URL=http://127.0.0.1:8080/v1 for a server of your own"
        )
