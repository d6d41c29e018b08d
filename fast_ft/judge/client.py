"""One OpenAI-compatible endpoint: who is asked, what a refusal means, when to ask again, and what it may cost.

The address is OPENAI_BASE_URL and the key OPENAI_API_KEY, from the environment only. The key goes into one header and
nowhere else: texts that come from the server pass through `clean`, and a redirect is refused.
"""

from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import dataclass
from typing import Any, NoReturn

from fast_ft.common.console import note
from fast_ft.common.errors import BudgetMissed, InputError
from fast_ft.common.text_safety import whole
from fast_ft.common.wording import counted
from fast_ft.judge import address, post, pricing
from fast_ft.judge.client_errors import REFUSALS, Failure, NoReply, Stopped, retry_after
from fast_ft.recipe.schema import Judge as Section

LONGEST_PAUSE = 600.0  #: seconds; a Retry-After beyond it ends the command
MOST_TEXT = 1 << 16  #: characters of a reply that are kept; one of 400 tokens has some thousand
MOST_TOKENS = 10**7  #: a larger count of tokens in a reply is no count


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said. `model`: the name that the server gave; token counts are the server's, or None."""

    text: str
    model: str
    prompt_tokens: int | None
    completion_tokens: int | None


class Endpoint:
    """Sends requests for one model, from any number of threads, within the section's caps.

    One place for retries: 408, 409, 429, 5xx, time-outs, dropped connections and replies that are no chat completion
    are tried again up to section.max_retries times, with exponential backoff and jitter; a Retry-After holds back every
    thread. `backoff` is the first wait in seconds.
    """

    def __init__(self, section: Section, backoff: float = 1.0) -> None:
        address.require_key()
        self.url, self._key = address.read()
        self._section = section
        self._prices = pricing.price(section)
        self._backoff = backoff
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._why: InputError | BudgetMissed | None = None  # what ended the command
        self._not_before = 0.0  # no request before this moment (time.monotonic)
        self._in_a_row = 0  # requests without a reply since the last reply
        self.sent = self.answered = 0
        self.spent = 0.0  #: dollars, where the price is known: what replies cost and what open requests may cost
        self.tokens = [0, 0]  # prompt, reply

    def stop(self) -> None:
        """Let no further request begin, and end all waiting."""
        self._stop.set()

    def ask(self, messages: list[dict[str, str]], max_tokens: int) -> Reply:
        """Return the model's reply.

        Raises NoReply where this request got none, Stopped after `stop`, BudgetMissed at a cap, and InputError where no
        other request can succeed either.
        """
        expected = sum(pricing.tokens_of(message["content"]) for message in messages)
        attempt = 0
        while True:
            self._wait()
            most = self._reserve(expected, max_tokens)
            try:
                reply = self._send(messages, max_tokens)
            except Failure as failure:
                if failure.refused:
                    self._settle(-most)
                attempt += 1
                self._after(failure, attempt)
                continue
            counts = [reply.prompt_tokens or expected, reply.completion_tokens or pricing.tokens_of(reply.text)]
            with self._lock:
                self.answered += 1
                self._in_a_row = 0
                self.tokens = [a + b for a, b in zip(self.tokens, counts, strict=True)]
            self._settle(pricing.dollars(self._prices, *counts) - most)
            return reply

    def clean(self, text: str, limit: int | None = None) -> str:
        """Return a server's text without the key; with a limit, one line of at most `limit` characters."""
        text = whole(text)
        if self._key and len(self._key) >= 8:  # a shorter one is a placeholder such as EMPTY, and may be a word
            text = text.replace(self._key, "[key]")
        if limit is None:
            return text
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= limit else text[: limit - 3] + "..."

    def _send(self, messages: list[dict[str, str]], max_tokens: int) -> Reply:
        content = {"model": self._section.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0.0}
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "fast_ft"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        seconds = self._section.timeout_seconds
        try:
            answer = post.post(f"{self.url}/chat/completions", json.dumps(content).encode(), headers, seconds)
        except TimeoutError:
            raise Failure(f"no whole reply within {seconds:g} s (judge.timeout_seconds)") from None
        except post.Unreached as error:
            raise Failure(f"no connection ({error})", refused=True, absent=True) from None
        except post.Broken as error:
            raise Failure(f"no whole reply ({error})") from None
        except post.TooLong:
            raise Failure(f"a reply of more than {post.MOST:,} bytes", retry=False) from None
        text = answer.body.decode("utf-8", "replace")
        if 200 <= answer.status < 300:
            return self._read(text)
        raise self._status(answer, text)

    def _read(self, body: str) -> Reply:
        try:
            content = json.loads(body)
            text = content["choices"][0]["message"]["content"]
        except (ValueError, TypeError, LookupError, RecursionError):
            raise Failure(f"no chat completion: {self.clean(body, 120)!r}") from None
        if not isinstance(text, str | None):
            raise Failure("no chat completion: its content is no text")
        # The reply is there and paid for, whatever stands around it.
        usage, model = content.get("usage"), content.get("model")
        counts = [_count(usage, "prompt_tokens"), _count(usage, "completion_tokens")]
        said = self.clean(model, 200) if isinstance(model, str) else ""
        return Reply(self.clean(text or "")[:MOST_TEXT], said, *counts)

    def _status(self, answer: post.HttpReply, text: str) -> Failure:
        status, headers = answer.status, answer.headers
        if 300 <= status < 400:
            to = self.clean(str(headers.get("location", "")), 200)
            return Failure(
                f"{self.url} sends requests on to {to!r} ({status}). No other address than the given one is asked, or "
                "told the key. Set OPENAI_BASE_URL to the address that is meant. Replies so far are kept.",
                fatal=True,
            )
        error = _error(text)
        said = f"{status}: {self.clean(str(error.get('message') or text), 300)}"
        if status in REFUSALS or error.get("code") == "insufficient_quota":
            reason = REFUSALS.get(status, "the account has no credit left")
            return Failure(f"{self.url} refuses ({said}): {reason}. Replies so far are kept.", fatal=True)
        again = status in (408, 409, 429) or status >= 500
        return Failure(said, retry=again, refused=True, pause=retry_after(headers) if again else None)

    def _after(self, failure: Failure, attempt: int) -> None:
        """Wait as a failure asks for, or raise what ends this request or all of them."""
        if failure.fatal:
            self._end(InputError(str(failure)))
        if (failure.pause or 0.0) > LONGEST_PAUSE:
            text = f"{self.url} asks to wait for {failure.pause:.0f} s. Replies so far are kept; judge again then."
            self._end(InputError(text))
        # A server that is not there at all should not take a minute of backoff to be noticed.
        retries = self._section.max_retries
        if failure.absent and not self.answered:
            retries = min(retries, 2)
        if not failure.retry or attempt > retries:
            with self._lock:
                self._in_a_row += 1
                hopeless = self._in_a_row >= (max(8, self._section.concurrency) if self.answered else 3)
            if hopeless:
                text = (
                    f"{self.url} answers no more; the last it said: {failure}. See that it runs and serves "
                    f"{self._section.model}. Replies so far are kept; the same command asks for the rest."
                )
                self._end(InputError(text))
            raise NoReply(f"{failure} (asked {attempt} times)" if attempt > 1 else str(failure))
        wait = min(60.0, self._backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
        if failure.pause is not None:
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + failure.pause)
            wait = failure.pause + random.uniform(0.0, 0.25) * self._backoff
        if wait > 5:
            note(f"judge: {failure}; again in {wait:.0f} s")
        self._stop.wait(wait)

    def _end(self, error: InputError | BudgetMissed) -> NoReturn:
        """Raise an error in every thread, at once: not a request more."""
        with self._lock:
            self._why = self._why or error
        self._stop.set()
        raise error

    def _wait(self) -> None:
        while (left := self._not_before - time.monotonic()) > 0 and not self._stop.is_set():
            self._stop.wait(left)
        if self._stop.is_set():
            raise Stopped if self._why is None else type(self._why)(str(self._why))

    def _reserve(self, prompt_tokens: int, reply_tokens: int) -> float:
        """Count a request, and return the most that it may cost; BudgetMissed at a cap."""
        most = pricing.dollars(self._prices, prompt_tokens, reply_tokens)
        over = None
        with self._lock:
            if self.sent >= self._section.max_requests:
                over = f"judge.max_requests: {counted(self.sent, 'request')} sent, retries included"
            elif self.spent + most > self._section.max_dollars:
                over = f"judge.max_dollars: {self.spent:.4f} dollars may be spent, retries included"
            else:
                self.sent += 1
                self.spent += most
        if over is not None:
            text = f"{over}. Replies so far are kept: raise it, and the same command asks for the rest."
            self._end(BudgetMissed(text))
        return most

    def _settle(self, difference: float) -> None:
        with self._lock:
            self.spent += difference


def _count(usage: object, name: str) -> int | None:
    """Return a count of tokens from a reply's `usage`; None where it is absent, or no count."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None  # True is an int, too


def _error(body: str) -> dict[str, Any]:
    """Return a refusal's `error`, or {} where the body has another form."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    error = content.get("error", content) if isinstance(content, dict) else {}
    return error if isinstance(error, dict) else {"message": error if isinstance(error, str) else ""}
