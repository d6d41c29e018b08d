"""Servers that want another form of requests, models that reason or refuse, filters, and a server that only fails."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from typing import Any

import pytest

from fast_ft.common.errors import BudgetMissed, InputError
from fast_ft.judge import client, client_errors, request_form, rubric
from fast_ft.judge.request_form import RequestForm
from tests.helpers.judge_server import completion
from tests.helpers.judged import COUNT, expected, found, judged
from tests.helpers.patience import PATIENCE

FILTERED = {"message": "The response was filtered by the content management policy.", "code": "content_filter"}
TOO_LONG = {"message": "This model's maximum context length is 8192 tokens.", "code": "context_length_exceeded"}


def test_a_reasoning_model_is_asked_in_the_form_it_wants_and_that_is_remembered(
    runs: Any, serve: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    server, folder = serve(lambda *_: "reasoning model"), runs("a", concurrency=1)
    scores = judged(folder)
    assert found(scores) == expected(folder) and scores["missing"] == 0
    assert server.requests == scores["asked"]["requests"] == COUNT + 2, "each refusal once, then never again"
    assert [sorted(body.keys() - {"model", "messages"}) for body in server.bodies[:4]] == [
        ["max_tokens", "temperature"], ["max_completion_tokens", "temperature"],
        ["max_completion_tokens"], ["max_completion_tokens"],
    ]  # fmt: skip
    assert server.bodies[-1]["max_completion_tokens"] == 400 + request_form.REASONING_TOKENS
    assert scores["asked_with"].startswith("max_completion_tokens, the server's own temperature")
    assert capfd.readouterr().err.count("asks for another form") == 2


@pytest.mark.parametrize(
    "body",
    [
        '{"error": {"message": "use max_completion_tokens", "type": "invalid_request_error"}}',
        '{"error": "use max_completion_tokens"}',
        '{"detail": "use max_completion_tokens"}',
        '{"object": "error", "message": "use max_completion_tokens", "code": 400}',
        '{"error": {"message": ["use max_completion_tokens"]}}',
        "use max_completion_tokens",
    ],
)
def test_what_a_server_asks_for_is_understood_in_any_body(body: str) -> None:
    asked = RequestForm().asked_for(client_errors.error_of(body))
    assert asked is not None and asked.limit == "max_completion_tokens"
    temperature = client_errors.error_of(body.replace("use max_completion_tokens", "temperature does not support 0"))
    assert RequestForm().asked_for(temperature) == RequestForm(temperature=None)


def test_requests_under_way_are_made_again_in_the_new_form(runs: Any, serve: Any) -> None:
    server, folder = serve(lambda *_: "reasoning model"), runs("a", concurrency=8, max_retries=0)
    server.gather(8)
    assert found(judged(folder)) == expected(folder) and server.requests <= COUNT + 2 * 8


def test_the_new_form_stays_within_the_caps(runs: Any, serve: Any, ended: threading.Event) -> None:
    server = serve(lambda *_: "reasoning model")
    with pytest.raises(BudgetMissed, match=f"judge.max_requests: {COUNT} requests"):
        judged(runs("a", max_requests=COUNT, concurrency=1))
    assert server.requests == COUNT
    # Eight are under way at once: 400 tokens each are within the cap. 4,496 each, in the new form, are not.
    ended.clear()
    together = threading.Barrier(8)
    server.before_reply = lambda place: (together if place < COUNT + 8 else ended).wait(PATIENCE)
    price = {"dollars_per_million_tokens": [0.0, 1000.0], "max_dollars": 0.4 * COUNT + 0.1}
    with pytest.raises(BudgetMissed, match=r"judge.max_dollars"):
        judged(runs("b", words="other", concurrency=8, **price))


def test_a_model_that_reasoned_to_the_end_gets_room_once(runs: Any, serve: Any) -> None:
    server, folder = serve(lambda *_: "thinker"), runs("a", concurrency=1)
    assert set(found(judged(folder)).values()) == {7.0} and server.requests == COUNT + 1


REPLIES = [
    (completion(None, "length", reasoning_content="8 7"), "reasoning only: the reply holds no answer", None),
    (completion("", "stop", reasoning="9 9"), "reasoning only: the reply holds no answer", None),
    (completion("<think>8 8, or", "length"), "reasoning only: the reply holds no answer", None),
    (completion(None, refusal="I can't judge this."), "refused: the judge model refuses", "I can't judge this."),
    (completion("", "content_filter"), "filtered: the server's content filter", ""),
    (completion("8 7\nBut", "content_filter"), "filtered: the server's content filter", "8 7\nBut"),
    (completion("10 1", "length"), "cut at its most tokens in the middle of its scores", "10 1"),
    (completion("Both are", "length"), "cut at its most tokens", "Both are"),
]


@pytest.mark.parametrize(("fault", "problem", "reply"), REPLIES, ids=range(len(REPLIES)))
def test_a_reply_without_scores_says_why(runs: Any, serve: Any, fault: str, problem: str, reply: str | None) -> None:
    server = serve(lambda place, before, text: fault if "Q 3?" in text else "")
    folder = runs("a")
    each = judged(folder)["prompts"]["3"]
    assert each["score"] is None and problem in each["problem"]
    assert reply is None or each["reply"] == reply
    asked = server.requests
    assert judged(folder)["prompts"]["3"]["problem"] == each["problem"] and server.requests == asked, "it was paid for"
    server.faults = lambda *_: ""
    assert found(judged(folder, ask_again=True)) == expected(folder) and server.requests == asked + 1


@pytest.mark.parametrize(
    "fault",
    [
        completion("9 7\nSo", "length"),
        completion("<think>\n3 3?\n</think>\n\n9 7"),
        completion("9 7", reasoning_content="3 3?"),
        completion("9 7", refusal=None),
        completion("9 7", refusal=""),
        completion([{"type": "thinking", "thinking": "3 3"}, {"type": "text", "text": "9 7"}]),  # type: ignore[arg-type]
    ],
    ids=range(6),
)
def test_what_stands_beside_an_answer_leaves_its_scores(runs: Any, serve: Any, fault: str) -> None:
    serve(lambda *_: fault)
    assert set(found(judged(runs("a"))).values()) == {7.0}


@pytest.mark.parametrize(
    ("error", "problem"),
    [(FILTERED, "content filter refuses this question"), (TOO_LONG, "too long for the judge model")],
)
def test_a_400_about_one_question_is_that_questions_alone(runs: Any, serve: Any, error: Any, problem: str) -> None:
    """Even where it meets every question: each is asked once, and no server is called down."""
    server = serve(lambda place, before, text: f"error 400 {json.dumps(error)}" if "Q 3?" in text else "")
    scores = judged(runs("a"))
    assert problem in scores["prompts"]["3"]["problem"] and scores["missing"] == 1 and server.requests == COUNT
    server.faults = lambda *_: f"error 400 {json.dumps(error)}"
    scores = judged(runs("b", words="other"))
    assert scores["missing"] == COUNT and server.requests == 2 * COUNT
    assert all(problem in each["problem"] for each in scores["prompts"].values())


def test_a_400_that_stays_is_not_called_a_server_that_is_down(runs: Any, serve: Any) -> None:
    server = serve(lambda *_: 'error 400 {"message": "top_k is required"}')
    with pytest.raises(InputError, match=r"runs, but refuses these requests.*400: top_k is required") as error:
        judged(runs("a", concurrency=1))
    assert server.requests == 3 and "no more" not in str(error.value) and "See that it runs" not in str(error.value)


@pytest.mark.parametrize(
    "error",
    [
        {"message": "the question asks for the temperature in Paris, and must be rewritten in 1 way"},
        {"message": "max_tokens is too small"},
        {"message": None, "param": "top_p", "code": "unsupported_value"},
        {},
    ],
)
def test_a_400_about_something_else_changes_no_form(error: Any) -> None:
    assert RequestForm().asked_for(error) is None


@pytest.mark.parametrize(
    "said",
    [
        "Unsupported value: 'temperature' does not support 0 with this model.",
        "Unsupported parameter: 'temperature' is not supported with this model.",
        "invalid temperature: only 1 is allowed for this model",
        "`temperature` is deprecated for this model.",
    ],
)
def test_each_servers_way_to_refuse_a_temperature_is_understood(said: str) -> None:
    assert RequestForm().asked_for({"message": said}) == RequestForm(temperature=None)
    assert RequestForm(temperature=None).asked_for({"message": said}) is None


# ---- how long it may take


def test_a_server_that_only_fails_is_given_up_in_bounded_time(
    runs: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With retries and pauses that would take six minutes: what bounds them is the time without any reply."""
    monkeypatch.setattr(client, "patience_of", lambda section: 0.7)
    server = serve(lambda *_: "status 500")
    started = time.monotonic()
    with pytest.raises(InputError, match="answers with errors only; the last it said: 500"):
        judged(runs("a", concurrency=1, max_retries=20))
    assert time.monotonic() - started < 60 and server.requests < 21


def test_a_server_that_fails_after_its_first_replies_is_given_up_too(
    runs: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "patience_of", lambda section: 0.7)
    serve(lambda place, before, text: "status 503" if place >= 4 else "")
    started = time.monotonic()
    with pytest.raises(InputError, match="answers with errors only"):
        judged(runs("a", concurrency=2, max_retries=20))
    assert time.monotonic() - started < 60


def test_the_minutes_bound_a_command_whatever_the_server_asks_for(runs: Any, serve: Any) -> None:
    server, folder = serve(lambda place, before, text: "429 590" if place == 5 else ""), runs("a", max_minutes=9)
    started = time.monotonic()
    with pytest.raises(BudgetMissed, match=r"judge.max_minutes: 9 minutes are over, or would be.*kept"):
        judged(folder)
    assert time.monotonic() - started < PATIENCE, "a pause beyond the minutes is not waited for"
    server.faults = lambda *_: ""
    assert found(judged(folder)) == expected(folder) and max(server.answered.values()) == 1


def test_how_long_it_may_take_is_said_before_anything_is_asked(
    runs: Any, serve: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    server, folder = serve(), runs("a", max_minutes=7, timeout_seconds=20)
    judged(folder)
    assert "it ends after 7 minutes at most, or 100 s without any reply" in capfd.readouterr().err
    assert server.requests == COUNT


# ---- the homework's protocol


def test_the_homeworks_protocol_asks_for_five_tokens_at_temperature_0_reference_first(runs: Any, serve: Any) -> None:
    server, folder = serve(), runs("a", protocol="ntu-ml-2025-hw5")
    scores = judged(folder)
    assert scores["rubric"] == "ntu-ml-2025-hw5-1" and scores["missing"] == 0 and scores["baselines"]["strong"] == 4.4
    for body in server.bodies:
        assert (body["max_tokens"], body["temperature"], body["model"]) == (5, 0, "gpt-4o-mini")
        text = body["messages"][-1]["content"]
        assert text.index("[Assistant 1]\nIt is") < text.index("[Assistant 2]\ntuned")
    before = server.requests
    judged(runs("b"))
    assert server.requests == 2 * before, "another protocol is another question"


def test_the_homeworks_rubric_changes_its_name_with_its_words() -> None:
    digest = hashlib.sha256(json.dumps([rubric.homework_pair("{q}", "a", "b")]).encode()).hexdigest()[:12]
    assert (rubric.HOMEWORK, digest) == ("ntu-ml-2025-hw5-1", "e7979324197b"), "the words have changed: a new name"


def test_five_tokens_that_end_within_a_score_give_none(runs: Any, serve: Any) -> None:
    serve(lambda *_: completion("9.5 8", "length"))
    assert set(found(judged(runs("a", protocol="ntu-ml-2025-hw5"))).values()) == {None}
