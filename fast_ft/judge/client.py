"""One OpenAI-compatible endpoint: who is asked, what a refusal means, when to ask again, and what it may cost.

The address is OPENAI_BASE_URL and the key OPENAI_API_KEY, from the environment only. The key goes into one header and
nowhere else: texts that come from the server pass through `clean`, and a redirect is refused.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from dataclasses import replace
from typing import NoReturn

from fast_ft.common.console import note
from fast_ft.common.errors import BudgetMissed, InputError
from fast_ft.common.text_safety import whole
from fast_ft.common.wording import counted
from fast_ft.judge import address, client_errors, completion, post, pricing
from fast_ft.judge.client_errors import Failure, NoReply, Stopped
from fast_ft.judge.completion import Reply
from fast_ft.judge.request_form import RequestForm
from fast_ft.recipe.schema import Judge as Section

LONGEST_PAUSE = 600.0  #: seconds; a Retry-After beyond it ends the command
MOST_TEXT = 1 << 16  #: characters of a reply that are kept; one of 400 tokens has some thousand
_NOT_ASCII = re.compile(r"[^ -~]")  #: what may be unprintable
SILENCE = 60.0  #: seconds beyond two time-outs; a server from which nothing came for so long is given up


def patience_of(section: Section) -> float:
    """Return after how many seconds without any reply a server is given up."""
    return 2 * section.timeout_seconds + SILENCE


class Endpoint:
    """Sends requests for one model, from any number of threads, within the section's caps.

    One place for retries: 408, 409, 429, 5xx, time-outs, dropped connections and replies that are no chat completion
    are tried again up to section.max_retries times, with exponential backoff and jitter; a Retry-After holds back every
    thread. A server that asks for another form of requests gets it, for this and all further requests. `backoff` is the
    first wait in seconds.
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
        self._heard = self._begun = time.monotonic()  # when the last reply came
        self.form = RequestForm()  #: what the server has asked for so far
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
            form = self.form
            most = self._reserve(expected, max_tokens + form.room)
            try:
                reply = self._send(form, messages, max_tokens)
            except Failure as failure:
                if failure.refused:
                    self._settle(-most)
                if failure.status in (400, 422) and self._adapt(form, form.asked_for(failure.error)):
                    continue
                attempt += 1
                self._after(failure, attempt)
                continue
            counts = [reply.prompt_tokens or expected, reply.completion_tokens or pricing.tokens_of(reply.text)]
            with self._lock:
                self.answered += 1
                self._in_a_row = 0
                self._heard = time.monotonic()
                self.tokens = [a + b for a, b in zip(self.tokens, counts, strict=True)]
            self._settle(pricing.dollars(self._prices, *counts) - most)
            if reply.ending != "reasoning" or not self._adapt(form, form.with_room()):
                return reply

    def _adapt(self, sent: RequestForm, asked_for: RequestForm | None) -> bool:
        """Take another form for all further requests; return whether the same request should be made again."""
        if asked_for is None:
            return False
        with self._lock:
            first = self.form == sent
            if first:  # else another thread has changed it meanwhile, and this request goes in that form
                self.form = asked_for
        if first:
            note(f"judge: {self._section.model} asks for another form of requests; from now on: {asked_for}")
        return True

    def clean(self, text: str, limit: int | None = None) -> str:
        """Return a server's text without the key; with a limit, one line of at most `limit` characters."""
        text = whole(text)
        if self._key and len(self._key) >= 8:  # a shorter one is a placeholder such as EMPTY, and may be a word
            text = text.replace(self._key, "[key]")
        if limit is None:
            return text
        text = " ".join(_NOT_ASCII.sub(lambda found: found[0] if found[0].isprintable() else " ", text).split())
        return text if len(text) <= limit else text[: limit - 3] + "..."

    def _send(self, form: RequestForm, messages: list[dict[str, str]], max_tokens: int) -> Reply:
        content = form.content(self._section.model, messages, max_tokens)
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
        return self._read(answer)

    def _read(self, answer: post.HttpReply) -> Reply:
        body = answer.body.decode("utf-8", "replace")
        if 300 <= answer.status < 400:
            to = self.clean(str(answer.headers.get("location", "")), 200)
            raise Failure(
                f"{self.url} sends requests on to {to!r} ({answer.status}). No other address than the given one is "
                "asked, or told the key. Set OPENAI_BASE_URL to the address that is meant. Replies so far are kept.",
                fatal=True,
            )
        if not 200 <= answer.status < 300:
            error = client_errors.error_of(body)
            said = self.clean(error["message"], 300)
            raise client_errors.of_status(answer.status, answer.headers, error, said, self.url)
        try:
            reply = completion.parse(body)
        except ValueError:
            raise Failure(f"no chat completion: {self.clean(body, 120)!r}") from None
        return replace(reply, text=self.clean(reply.text)[:MOST_TEXT], model=self.clean(reply.model, 200))

    def _after(self, failure: Failure, attempt: int) -> None:
        """Wait as a failure asks for, or raise what ends this request or all of them."""
        if failure.fatal:
            self._end(InputError(str(failure)))
        if (failure.pause or 0.0) > LONGEST_PAUSE:
            text = f"{self.url} asks to wait for {failure.pause:.0f} s. Replies so far are kept; judge again then."
            self._end(InputError(text))
        if failure.own:
            raise NoReply(str(failure))
        # A server that is not there at all should not take a minute of backoff to be noticed.
        retries = self._section.max_retries
        if failure.absent and not self.answered:
            retries = min(retries, 2)
        now, patience = time.monotonic(), patience_of(self._section)
        silent = now - self._heard > patience
        if silent or not failure.retry or attempt > retries:
            with self._lock:
                self._in_a_row += 1
                hopeless = self._in_a_row >= (max(8, self._section.concurrency) if self.answered else 3)
            if silent or hopeless:
                self._end(InputError(self._given_up(failure)))
            raise NoReply(f"{failure} (asked {attempt} times)" if attempt > 1 else str(failure))
        wait = min(60.0, self._backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
        wait = min(wait, max(0.0, self._heard + patience - now))
        if failure.pause is not None:
            with self._lock:
                self._not_before = max(self._not_before, now + failure.pause)
                self._heard = max(self._heard, self._not_before)  # a server that names a time is not silent until then
            wait = failure.pause + random.uniform(0.0, 0.25) * self._backoff
        self._keep_time(now + wait)
        if wait > 5:
            note(f"judge: {failure}; again in {wait:.0f} s")
        self._stop.wait(wait)

    def _given_up(self, failure: Failure) -> str:
        """Return the message of a server that nothing more is asked of."""
        kept = "Replies so far are kept; the same command asks for the rest."
        if 400 <= failure.status < 500 and not failure.retry:
            return (
                f"{self.url} runs, but refuses these requests; the last it said: {failure}. See that "
                f"{self._section.model} is a chat model there, and that it takes such requests. {kept}"
            )
        said = "answers with errors only" if failure.status >= 500 else "answers no more"
        return (
            f"{self.url} {said}; the last it said: {failure}. See that it runs and serves {self._section.model}. {kept}"
        )

    def _keep_time(self, moment: float) -> None:
        """End the command where a moment (time.monotonic) is beyond judge.max_minutes."""
        minutes = self._section.max_minutes
        if moment - self._begun > 60 * minutes:
            text = f"judge.max_minutes: {minutes:g} minutes are over, or would be before the next try"
            self._end(BudgetMissed(f"{text}. Replies so far are kept: the same command asks for the rest."))

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
        self._keep_time(time.monotonic())

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
