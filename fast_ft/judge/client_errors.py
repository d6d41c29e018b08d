"""What can go wrong with one request to a judge: which failures are worth another try, and when."""

from __future__ import annotations

import datetime as dt
import email.utils
from typing import Protocol

#: What an HTTP status means that no further request would change.
REFUSALS = {
    401: "the key is not accepted; set OPENAI_API_KEY to a valid one",
    402: "the account has no credit",
    403: "the key may not use this model or this address",
    404: "the address or the model is unknown there; see OPENAI_BASE_URL and judge.model",
}


class NoReply(Exception):
    """A request that brought no reply, for a reason of its own or after all retries. Others may still succeed."""


class Stopped(Exception):
    """Another request has ended the command."""


class Failure(Exception):
    """A request that failed.

    retry: another try may succeed; fatal: nothing else would; refused: it cost nothing; absent: nobody listens at that
    address; pause: seconds of Retry-After.
    """

    def __init__(
        self,
        text: str,
        *,
        retry: bool = True,
        fatal: bool = False,
        refused: bool = False,
        absent: bool = False,
        pause: float | None = None,
    ) -> None:
        super().__init__(text)
        self.retry, self.fatal, self.refused, self.absent, self.pause = retry, fatal, refused, absent, pause


class Headers(Protocol):
    """A reply's headers, as http.client or a dict holds them."""

    def get(self, name: str, default: str, /) -> str:
        """Return a header's text, or `default`."""


def retry_after(headers: Headers) -> float | None:
    """Return the seconds that Retry-After (a number or a date) or OpenAI's retry-after-ms asks for."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        when = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, TypeError):
        return None
    when = when if when.tzinfo else when.replace(tzinfo=dt.UTC)
    return max(0.0, (when - dt.datetime.now(dt.UTC)).total_seconds())
