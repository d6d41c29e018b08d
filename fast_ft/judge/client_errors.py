"""What can go wrong with one request to a judge: which failures are worth another try, and when."""

from __future__ import annotations

import datetime as dt
import email.utils
import json
import re
from typing import Any, Protocol

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
    address; status: the HTTP status of a server that answered, else 0; pause: seconds of Retry-After; own: the reason
    lies in what this one request asks, so it tells nothing of the others; error: the reply's `error`.
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
        self.status, self.own = 0, False
        self.error: dict[str, Any] = {}


_FILTERED = re.compile(
    r"content[_ ]?(?:filter|policy|management|moderation)|data_inspection_failed|responsible ?ai"
    r"|safety (?:filter|system)",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(r"context[_ ]length|context window|maximum context|too long", re.IGNORECASE)


def of_status(status: int, headers: Headers, error: dict[str, Any], said: str, url: str) -> Failure:
    """Return what a reply with an HTTP status of 400 or more means.

    error: what `error_of` found in the reply. said: the server's words on one line, without the key.
    """
    failure = _of_status(status, headers, error, f"{status}: {said}", url)
    failure.status, failure.error = status, error
    return failure


def _of_status(status: int, headers: Headers, error: dict[str, Any], said: str, url: str) -> Failure:
    code = error.get("code")
    if status < 500 and status not in (401, 402, 404, 429):
        about = " ".join(str(error.get(name) or "") for name in ("code", "type", "message", "innererror"))
        for form, reason in (
            (_FILTERED, "the server's content filter refuses this question"),
            (_TOO_LONG, "the question is too long for the judge model"),
        ):
            if form.search(about):
                failure = Failure(f"{reason} ({said})", retry=False, refused=True)
                failure.own = True
                return failure
    if status in REFUSALS or code == "insufficient_quota":
        reason = REFUSALS.get(status, "the account has no credit left")
        return Failure(f"{url} refuses ({said}): {reason}. Replies so far are kept.", fatal=True)
    again = status in (408, 409, 429) or status >= 500
    return Failure(said, retry=again, refused=True, pause=retry_after(headers) if again else None)


def error_of(body: str) -> dict[str, Any]:
    """Return a refusal's `error`; its `message` is the body where a server has no such field."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = {}
    error = content.get("error", content) if isinstance(content, dict) else {}
    if not isinstance(error, dict):
        error = {"message": error}
    said = error.get("message") or error.get("detail")
    return error | {"message": said if isinstance(said, str) else body}


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
