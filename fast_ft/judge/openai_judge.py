"""A judge model behind an OpenAI-compatible endpoint; every reply kept, and asked for once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import whole
from fast_ft.common.wording import counted
from fast_ft.judge import address, client, client_errors, pricing, reading, rubric, statistics
from fast_ft.judge.claims import Scores
from fast_ft.judge.reply_cache import KeptReply, ReplyCache, content_key
from fast_ft.judge.request_form import REASONING_TOKENS
from fast_ft.judge.scoring import Item, Judgment
from fast_ft.recipe.schema import Judge as Section

BASELINES = {"simple": 2.4, "medium": 4.15, "strong": 4.4}  #: the homework's mean scores
_PAIRWISE_NOTES = [
    "The homework's baselines stand beside these scores for orientation only: another judge, another wording of the "
    "rubric or other reference answers give other scores for the same answers.",
    "The interval is over prompts. It holds neither the judge's own wavering nor its leanings, such as towards long "
    "answers or towards one of the two places.",
]
NOTES = {
    rubric.PAIRWISE: _PAIRWISE_NOTES,
    rubric.HOMEWORK: _PAIRWISE_NOTES,
    rubric.SINGLE: [
        "Single answers, without references: such scores compare with nothing but scores of the same judge under the "
        "same rubric, and not with the homework's baselines.",
        "The interval is over prompts. It holds neither the judge's own wavering nor its leanings, such as towards "
        "long answers.",
    ],
}
#: Why a reply that came has no scores, by its ending; other endings leave it to the reply's words.
NO_SCORE = {
    "refused": "refused: the judge model refuses to judge this answer",
    "filtered": "filtered: the server's content filter ended the reply",
    "reasoning": f"reasoning only: the reply holds no answer, though it had room for {REASONING_TOKENS:,} tokens of "
    "reasoning; let the model reason less, or choose another judge.model",
}


class OpenAIJudge:
    """Judge with a model. Call it within `asking`."""

    def __init__(self, section: Section, verdicts: ReplyCache) -> None:
        self.url, _ = address.read()
        self.rubric = rubric.name_of(section)
        self.labelled = rubric.LABELLED[self.rubric]
        self._section, self._verdicts = section, verdicts
        self._pairwise = self.rubric != rubric.SINGLE
        self.concurrency = section.concurrency
        self._endpoint: client.Endpoint | None = None
        self._lock = threading.Lock()
        self.cached = 0
        self.answered_by: set[str] = set()

    def print_forecast(self, items: Sequence[Item], *, ask_again: bool = False) -> None:
        """Print what judging would take, and ask nothing. Raises InputError where that is over a cap."""
        if ask_again:
            self.forget_unreadable(items)
        estimate = self.estimate(items)
        judge = f"{self._section.model} at {self.url}, rubric {self.rubric} ({self.labelled})"
        print(f"{judge}: {estimate}{self._time(estimate)}")
        self.check_caps(estimate)

    @contextlib.contextmanager
    def asking(self, items: Sequence[Item], *, ask_again: bool = False, backoff: float = 1.0) -> Iterator[None]:
        """Judge these items within this: no other command writes replies meanwhile, and the caps are kept.

        ask_again: kept replies without a score are asked for again. backoff: seconds before the first retry. Raises
        InputError where a cap is too low, and where a connection is needed and there is no key.
        """
        with self._verdicts.locked():
            if ask_again:
                self.forget_unreadable(items)
            estimate = self.estimate(items)
            note(f"judge: {self._section.model} at {self.url}, {self.labelled}: {estimate}{self._time(estimate)}")
            self.check_caps(estimate)
            if estimate.requests:
                self.open(backoff)
            yield

    def open(self, backoff: float = 1.0) -> None:
        """Make the connection; InputError without a key. `backoff`: seconds before the first retry."""
        self._endpoint = client.Endpoint(self._section, backoff)

    def stop(self) -> None:
        """Begin no further request."""
        if self._endpoint is not None:
            self._endpoint.stop()

    def estimate(self, items: Iterable[Item]) -> pricing.Estimate:
        """Return what it takes to judge these; tokens are counted from bytes, rather too many."""
        asked = {self._key(messages): messages for item in items for messages in self._questions(*item)}
        new = [messages for key, messages in asked.items() if self._verdicts.get(key) is None]
        prompt = sum(pricing.tokens_of(message["content"]) for messages in new for message in messages)
        reply = rubric.MAX_TOKENS[self.rubric] * len(new)
        each = pricing.price(self._section)
        cost = pricing.dollars(each, prompt, reply)
        return pricing.Estimate(len(new), len(asked) - len(new), prompt, reply, cost if each or not new else None)

    def _time(self, estimate: pricing.Estimate) -> str:
        """Return how long asking may take, in words; "" where nothing is asked."""
        if not estimate.requests:
            return ""
        silent = client.patience_of(self._section)
        return f"; it ends after {self._section.max_minutes:g} minutes at most, or {silent:g} s without any reply"

    def check_caps(self, estimate: pricing.Estimate) -> None:
        """Raise InputError where the estimate is over a cap: nothing is asked then."""
        section = self._section
        if estimate.requests > section.max_requests:
            raise InputError(
                f"judge.max_requests: {section.max_requests}, but this takes "
                f"{counted(estimate.requests, 'request')}. Raise it, or judge fewer answers. Nothing was asked."
            )
        if estimate.dollars is not None and estimate.dollars > section.max_dollars:
            raise InputError(
                f"judge.max_dollars: {section.max_dollars:g}, but this may cost {estimate.dollars:.4f} dollars. "
                "Raise it, or judge fewer answers. Nothing was asked."
            )

    def forget_unreadable(self, items: Iterable[Item]) -> None:
        """Let replies that hold no score be asked for again."""
        for item in items:
            for turn, messages in enumerate(self._questions(*item)):
                kept = self._verdicts.get(key := self._key(messages))
                if kept is not None and isinstance(self._read(kept, swapped=turn == 1), str):
                    self._verdicts.forget({key})

    def facts(self) -> dict[str, Any]:
        """Return what scores.json says of the judge and of this command's requests."""
        sent = self._endpoint
        known = pricing.price(self._section) is not None
        return {
            "model": self._section.model,
            "answered_by": sorted(self.answered_by),
            "endpoint": self.url,
            "rubric": self.rubric,
            "labelled": self.labelled,
            "scale": [1, 10],
            "asked_with": str(sent.form) if sent else None,
            **({"baselines": BASELINES} if self._pairwise else {}),
            "asked": {
                "requests": sent.sent if sent else 0,
                "cached": self.cached,
                "prompt_tokens": sent.tokens[0] if sent else 0,
                "completion_tokens": sent.tokens[1] if sent else 0,
                "dollars": round(sent.spent, 6) if sent and known else None if sent else 0.0,
            },
            "notes": NOTES[self.rubric],
        }

    def totals(self, prompts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the mean score of the reference answers, and what the order of the two answers did."""
        given = [each["reference_score"] for each in prompts.values() if each["reference_score"] is not None]
        both = [
            (each["swapped"]["score"], each["first_score"])
            for each in prompts.values()
            if "swapped" in each and None not in (each["swapped"]["score"], each["first_score"])
        ]
        effect = round(fmean(ahead - behind for ahead, behind in both), 4) if both else None
        return {
            "reference_mean": statistics.mean(given),
            "swapped": {"order_effect": effect} if effect is not None else None,
        }

    def __call__(self, question: str, reference: str | None, answer: str) -> Judgment:
        """Judge one answer. Safe to call from several threads at once, with different content."""
        questions = self._questions(question, reference, answer)
        passes = [self._pass(messages, swapped=turn == 1) for turn, messages in enumerate(questions)]
        first = passes[0]
        if len(passes) == 1:
            return Judgment(first.pop("score"), first)
        both = [each["score"] for each in passes]
        swapped = passes[1]
        problem = first.pop("problem", None) or swapped.pop("problem", None)
        # One order alone would carry that place's advantage into the mean.
        score = None if None in both else sum(both) / 2
        details = {**first, "first_score": first["score"], "swapped": swapped} | (
            {"problem": problem} if problem else {}
        )
        details.pop("score")
        return Judgment(score, details)

    def _pass(self, messages: list[dict[str, str]], *, swapped: bool) -> dict[str, Any]:
        try:
            kept = self._reply(messages)
        except client_errors.NoReply as error:
            return {"score": None, "reference_score": None, "reply": None, "problem": f"no reply: {error}"}
        reply, found = whole(kept.reply), self._read(kept, swapped=swapped)
        if isinstance(found, str):
            return {"score": None, "reference_score": None, "reply": reply, "problem": found}
        score, other = (found.first, found.second) if swapped else (found.second, found.first)
        return {"score": score, "reference_score": other, "reply": reply}

    def _read(self, kept: KeptReply, *, swapped: bool) -> Scores | str:
        """Return a reply's scores, or why it has none."""
        if kept.ending in NO_SCORE:
            return NO_SCORE[kept.ending]
        count = 2 if self._pairwise else 1
        found = reading.read(whole(kept.reply), count, reference_first=not swapped, cut=kept.ending == "cut")
        return f"unreadable: {found}" if isinstance(found, str) else found

    def _reply(self, messages: list[dict[str, str]]) -> KeptReply:
        key = self._key(messages)
        verdict = self._verdicts.get(key)
        with self._lock:
            self.cached += verdict is not None
        if verdict is None:
            assert self._endpoint is not None, "open() comes before judging"
            reply = self._endpoint.ask(messages, rubric.MAX_TOKENS[self.rubric])
            counts = (reply.prompt_tokens, reply.completion_tokens)
            verdict = KeptReply(key, reply.text, reply.model, self.rubric, *counts, reply.ending)
            self._verdicts.add(verdict)
        with self._lock:
            self.answered_by.add(whole(verdict.model))
        return verdict

    def _questions(self, question: str, reference: str | None, answer: str) -> Iterator[list[dict[str, str]]]:
        if not self._pairwise:
            yield rubric.single(question, answer)
            return
        assert reference is not None
        if self.rubric == rubric.HOMEWORK:
            yield rubric.homework_pair(question, reference, answer)
            return
        yield rubric.pair(question, reference, answer)
        if self._section.swap:
            yield rubric.pair(question, answer, reference)

    def _key(self, messages: list[dict[str, str]]) -> str:
        # The address too: a local model under OpenAI's name is another judge.
        return content_key(model=self._section.model, endpoint=self.url, rubric=self.rubric, messages=messages)
