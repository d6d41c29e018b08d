"""The judge: replies read, faults survived, nothing asked twice, caps kept, the key nowhere; what scores.json says."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from email.utils import formatdate
from pathlib import Path
from typing import Any, get_args

import pytest

from fast_ft.cli.main import main
from fast_ft.common import signals
from fast_ft.common.errors import BudgetMissed, InputError
from fast_ft.judge import address, client, client_errors, post, pricing, rubric, scoring, statistics
from fast_ft.judge.kinds import KINDS
from fast_ft.judge.reference_judge import ReferenceJudge
from fast_ft.judge.reply_cache import COUNTS, FILE, KeptReply, ReplyCache
from fast_ft.judge.scoring import Group, Item, Judgment, judge_all, summarise, too_many_missing
from fast_ft.pipeline import judge_phase
from fast_ft.recipe.schema import JudgeKindName
from fast_ft.run.folder import RunDir
from tests.helpers import killed
from tests.helpers.judge_server import scores_for
from tests.helpers.judged import COUNT, KEY, expected, found, judged
from tests.helpers.parts import ROOT
from tests.helpers.patience import PATIENCE, wait_until


def test_the_rubrics_name_changes_with_its_words() -> None:
    words = json.dumps([rubric.pair("{q}", "a", "b"), rubric.single("{q}", "a")])
    digest = hashlib.sha256(words.encode()).hexdigest()[:12]
    assert (rubric.PAIRWISE, rubric.SINGLE, digest) == ("pairwise-1", "single-1", "424f1df51402"), (
        "the words have changed: give the rubrics new names, since kept replies answer the old ones"
    )


# ---- against a server


def test_the_second_score_counts_and_the_reference_stands_first(runs: Any, serve: Any) -> None:
    server, folder = serve(), runs("a", concurrency=8)
    server.gather(8)
    scores = judged(folder)
    assert found(scores) == expected(folder)
    assert scores["mean"] == pytest.approx(sum(expected(folder).values()) / COUNT, abs=1e-4)
    assert scores["low"] < scores["mean"] < scores["high"] and scores["missing"] == 0
    assert server.requests == COUNT and server.most_at_once == 8
    assert all(text.index("It is") < text.index("tuned") for text in server.seen)
    assert scores["asked"]["prompt_tokens"] == 100 * COUNT and scores["answered_by"] == ["judge-2026-01-01"]
    assert scores["asked"]["dollars"] == pytest.approx(COUNT * (100 * 0.15 + 10 * 0.60) / 1e6)
    assert scores["baselines"] == {"simple": 2.4, "medium": 4.15, "strong": 4.4}
    assert "another judge" in scores["notes"][0] and scores["rubric"] == "pairwise-1"
    assert scores == json.loads(folder.scores.read_text())


def test_faults_change_no_score_and_nothing_answered_is_asked_again(runs: Any, serve: Any, hurry: Any) -> None:
    """Each fault meets a question, when it is asked first: the same scores as without."""
    faults = ["429 1", "status 500", "drop", "half", "nonsense", "empty", "slow 600", "status 503", "429"]
    plan = {f"Q {2 * n}?": fault for n, fault in enumerate(faults)}

    def fault(place: int, before: int, text: str) -> str:
        return next((fault for question, fault in plan.items() if question in text and not before), "")

    hurry("Q 12?")  # the slow one
    server, folder = serve(fault), runs("a", concurrency=4, timeout_seconds=0.3)
    scores = judged(folder)
    assert found(scores) == expected(folder) and scores["missing"] == 0
    assert max(server.answered.values()) == 1 and len(server.answered) == COUNT
    assert server.requests == COUNT + len(faults) == scores["asked"]["requests"]
    lines = (folder.root.parent / FILE).read_text().splitlines()
    assert len(lines) == len({json.loads(line)["key"] for line in lines}) == COUNT


def test_retry_after_holds_back_every_thread(runs: Any, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoints: list[client.Endpoint] = []

    class Seen(client.Endpoint):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            endpoints.append(self)

    monkeypatch.setattr(client, "Endpoint", Seen)
    server, folder = serve(lambda place, before, text: "429 1" if place == 8 else ""), runs("a", concurrency=4)
    server.before_reply = lambda place: place <= 8 or wait_until(lambda: endpoints[0]._not_before)
    judged(folder)
    when = server.times[8][0]
    # The three other threads may each have a request on its way before the pause is known; after it none is sent.
    later = [moment - when for moment, _ in server.times[8 + 4 :]]
    assert len(later) == COUNT + 1 - 12 and min(later) >= 1


def test_retry_after_is_read_as_seconds_as_a_date_and_in_milliseconds() -> None:
    assert client_errors.retry_after({"retry-after": "3"}) == 3
    assert client_errors.retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    began = time.time()
    found = client_errors.retry_after({"retry-after": formatdate(began + 30, usegmt=True)})
    assert 29 - (time.time() - began) <= found <= 30, "a date has whole seconds"  # type: ignore[operator]
    assert client_errors.retry_after({"retry-after": "soon"}) is None
    assert client_errors.retry_after({"retry-after": "nan"}) is None
    assert client_errors.retry_after({}) is None


def test_too_long_a_retry_after_ends_the_command(runs: Any, serve: Any) -> None:
    server, folder = serve(lambda *_: "429 86400"), runs("a", concurrency=1)
    with pytest.raises(InputError, match="wait for 86400 s"):
        judged(folder)
    assert server.requests == 1


def test_a_second_run_asks_nothing_and_needs_no_key(runs: Any, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server, folder = serve(), runs("a")
    first = judged(folder)
    monkeypatch.delenv("OPENAI_API_KEY")
    again = judged(folder)
    assert server.requests == COUNT and found(again) == found(first)
    assert again["asked"] == {
        "requests": 0,
        "cached": COUNT,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "dollars": 0.0,
    }


def test_another_model_address_or_answer_is_another_question(runs: Any, serve: Any) -> None:
    server, folder = serve(), runs("a")
    judged(folder)
    judged(runs("b", model="other"))
    assert server.requests == 2 * COUNT
    judged(runs("c", words="other"))
    assert server.requests == 3 * COUNT
    elsewhere = serve()
    judged(folder)
    assert elsewhere.requests == COUNT


def test_equal_answers_are_asked_once(runs: Any, serve: Any) -> None:
    server, folder = serve(), runs("a", words="base", base=5)
    scores = judged(folder)
    assert server.requests == COUNT and scores["base"]["count"] == 5
    assert scores["gain"]["difference"] == 0 and scores["gain"]["more_than_noise"] is None


def _judge_in_a_process(folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    judged(RunDir.at(folder))


def test_after_a_kill_no_answered_request_is_sent_again(runs: Any, serve: Any) -> None:
    server = serve(lambda place, before, text: "slow 600" if place >= 8 else "")  # so two are under way at the kill
    folder = runs("a", concurrency=2)
    environment = {name: os.environ[name] for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY")}
    process = multiprocessing.get_context("fork").Process(target=_judge_in_a_process, args=(folder.root, environment))
    process.start()
    kept = folder.root.parent / FILE
    wait_until(
        lambda: server.requests == 10 and kept.exists() and kept.read_bytes().count(b"\n") == 8, process.is_alive
    )
    process.kill()
    process.join()
    with kept.open("ab") as file:
        file.write(b'{"key": "half a li')  # as a kill in the middle of a write leaves it
    there = {json.loads(line)["key"] for line in kept.read_bytes().splitlines()[:-1]}
    server.faults = lambda *_: ""
    scores = judged(folder)
    assert scores["missing"] == 0 and scores["asked"]["cached"] == len(there) == 8
    # A reply that was on its way at the kill never arrived: one a thread is asked again.
    assert server.requests == 10 + COUNT - 8 and sum(server.answered.values()) == COUNT
    judged(folder)
    assert server.requests == 10 + COUNT - 8


def test_ctrl_c_keeps_what_came_and_what_was_under_way(
    runs: Any, serve: Any, ended: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(place: int, before: int, text: str) -> str:
        if place == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return ""

    monkeypatch.setattr(scoring, "GRACE", PATIENCE)
    server, folder = serve(interrupt), runs("a", concurrency=2)
    server.before_reply = lambda place: place < 8 or ended.wait(PATIENCE)
    assert main(["judge", str(folder.root)]) == 130 and 9 <= server.requests <= 10
    assert main(["judge", str(folder.root)]) == 0 and server.requests == COUNT


def test_unreadable_replies_are_missing_with_their_text_kept(runs: Any, serve: Any) -> None:
    odd = {"Q 3?": "say 9 11", "Q 4?": "say ", "Q 5?": "say I cannot."}
    server = serve(lambda place, before, text: next((odd[q] for q in odd if q in text and not before), ""))
    folder = runs("a")
    scores = judged(folder)
    assert [scores["prompts"][key]["score"] for key in "345"] == [None] * 3
    assert [scores["prompts"][key]["reply"] for key in "345"] == ["9 11", "", "I cannot."]
    assert "11 is no score" in scores["prompts"]["3"]["problem"] and "empty" in scores["prompts"]["4"]["problem"]
    there = [value for key, value in expected(folder).items() if key not in "345"]
    assert scores["mean"] == pytest.approx(sum(there) / len(there), abs=1e-4)  # never a zero
    assert scores["missing"] == 3 and scores["missing_share"] == 0.125
    assert "3 of 24" in (too_many_missing(scores) or "")
    judged(folder)
    assert server.requests == COUNT  # an unreadable reply is a reply
    assert found(judged(folder, ask_again=True)) == expected(folder)
    assert server.requests == COUNT + 3


def test_two_percent_missing_is_the_limit() -> None:
    def scores(missing: int) -> dict[str, Any]:
        judgments = {str(i): Judgment(None if i < missing else 5.0, {"problem": "p"}) for i in range(100)}
        return summarise(judgments, Group(), 0)

    assert too_many_missing(scores(2)) is None and "3 of 100" in (too_many_missing(scores(3)) or "")


def test_a_request_without_reply_is_missing_and_asked_again_next_time(runs: Any, serve: Any) -> None:
    down = True
    server = serve(lambda place, before, text: "status 500" if down and "Q 7?" in text else "")
    folder = runs("a", max_retries=2)
    scores = judged(folder)
    assert scores["missing"] == 1 and scores["prompts"]["7"]["reply"] is None
    assert "asked 3 times" in scores["prompts"]["7"]["problem"] and server.requests == COUNT + 2
    down = False
    assert found(judged(folder)) == expected(folder) and server.requests == COUNT + 3


@pytest.mark.parametrize(
    ("fault", "message", "most"),
    [
        ("status 401", "key is not accepted", 4),
        ("status 404", "model is unknown there", 4),
        ("status 400", "runs, but refuses these requests; the last it said: 400", 8),
        ("nonsense", "answers no more.*welcome", 16),
    ],
)
def test_a_server_that_refuses_ends_the_command_soon(
    runs: Any, serve: Any, fault: str, message: str, most: int
) -> None:
    server = serve(lambda *_: fault)
    folder = runs("a", concurrency=4, max_retries=1)
    with pytest.raises(InputError, match=message) as error:
        judged(folder)
    assert server.requests <= most and KEY not in str(error.value) and not folder.scores.exists()


def test_a_server_that_is_not_there_is_a_message(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and listens to nobody
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/v1")
        with pytest.raises(InputError, match="connection refused"):
            judged(runs("a"))


# ---- a reply has a limit in time and size, and comes from the server that was asked


@pytest.mark.parametrize("fault", ["drip 0.01", "drip-head 0.02", "slow 600"])
def test_a_reply_that_never_ends_is_given_up(runs: Any, serve: Any, hurry: Any, fault: str) -> None:
    hurry("Q 3?")
    serve(lambda place, before, text: fault if "Q 3?" in text and not before else "")
    folder = runs("a", max_retries=0, timeout_seconds=0.3)
    each = judged(folder)["prompts"]["3"]
    assert each["score"] is None and "no whole reply within 0.3 s (judge.timeout_seconds)" in each["problem"]
    assert found(judged(folder)) == expected(folder)


@pytest.mark.parametrize("fault", ["flood", "gzip 64"])
def test_a_reply_without_measure_is_not_kept(runs: Any, serve: Any, fault: str) -> None:
    server = serve(lambda place, before, text: fault if "Q 3?" in text and not before else "")
    folder = runs("a", concurrency=1)
    tracemalloc.start()
    try:
        each = judged(folder)["prompts"]["3"]
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert "a reply of more than 1,048,576 bytes" in each["problem"] and server.requests == COUNT, "nor asked for again"


def test_a_compressed_reply_is_read_though_nobody_asked_for_compression(runs: Any, serve: Any) -> None:
    serve(lambda *_: "gzip 0")
    assert set(found(judged(runs("a"))).values()) == {7.0}


def test_a_redirect_is_refused_and_no_other_server_is_told_the_key(runs: Any, serve: Any) -> None:
    other = serve()
    elsewhere = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
    server, folder = serve(lambda *_: f"to {elsewhere}"), runs("a", concurrency=1)
    with pytest.raises(InputError, match=rf"sends requests on to '{elsewhere}' \(307\).*Set OPENAI_BASE_URL"):
        judged(folder)
    assert server.requests == 1 and other.requests == 0 and not folder.scores.exists()


def test_ctrl_c_leaves_a_server_that_goes_on_for_ever(runs: Any, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "GRACE", 0.1)
    server = serve(lambda place, before, text: "drip 1" if place >= 6 else "")  # 500 bytes
    folder = runs("a", timeout_seconds=600, concurrency=4)
    kept = folder.root.parent / FILE

    def interrupt() -> None:
        with contextlib.suppress(AssertionError):
            wait_until(lambda: server.requests == 10 and kept.exists() and kept.read_bytes().count(b"\n") == 6)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(["judge", str(folder.root)]) == 130
    assert len(kept.read_text().splitlines()) == 6 and server.requests == 10, "what was answered is kept"
    server.over.set()
    server.faults = lambda *_: ""
    assert found(judged(folder)) == expected(folder)


def judge_patiently(folder: Path, errors: Path, grace: float) -> None:
    """In a process of its own: what `python -m fast_ft judge` does, with these seconds for calls under way."""
    scoring.GRACE, signals.GRACE = grace, 2 * PATIENCE
    signals.end_in_time()
    killed.run(["judge", str(folder)], str(errors), {})


@pytest.mark.parametrize(("kinds", "grace"), [([signal.SIGTERM], 0.1), ([signal.SIGINT, signal.SIGTERM], 600)])
def test_the_process_ends_though_its_threads_wait(runs: Any, serve: Any, kinds: list[int], grace: float) -> None:
    """After one signal and the grace of those under way; after a second one without that."""
    server, folder = serve(lambda *_: "slow 600"), runs("a", timeout_seconds=600, concurrency=3)
    errors = folder.root.parent / "errors"
    process = multiprocessing.get_context("fork").Process(target=judge_patiently, args=(folder.root, errors, grace))
    process.start()
    wait_until(lambda: server.requests == 3, process.is_alive)
    for kind in kinds:
        os.kill(process.pid or 0, kind)
    process.join(PATIENCE)  # signals.GRACE is longer
    assert process.exitcode == 130 and "Traceback" not in errors.read_text()


def ask_once(url: str, said: Any) -> None:
    """In a process of its own, which stops itself as soon as it has sent its request."""
    send = post._Until.sendall

    def send_and_stop(self: Any, content: bytes) -> None:
        send(self, content)
        if content.endswith(b"{}"):
            os.kill(os.getpid(), signal.SIGSTOP)

    post._Until.sendall = send_and_stop  # type: ignore[method-assign]
    said.put(post.post(url, b"{}", {}, 0.3).body)


def test_a_process_that_was_stopped_finds_the_reply_that_came_meanwhile() -> None:
    """Stopped until the reply's time is over: it is paid for all the same."""
    context, body = multiprocessing.get_context("fork"), b"x" * 5000
    said = context.SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        process = context.Process(target=ask_once, args=(url, said))
        process.start()
        try:
            connection, _ = server.accept()
            with connection:
                assert process.pid is not None and os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + body)
                time.sleep(0.4)  # longer than the time that it gives the exchange
                os.kill(process.pid, signal.SIGCONT)
                process.join(PATIENCE)
            assert process.exitcode == 0 and said.get() == body
        finally:
            process.kill()


# ---- whatever a server says


ODD_NUMBERS = ["NaN", "Infinity", "-1", "true", "1e3", '"7"', "[]", "{}", "null", "9" * 400, "9" * 5000, "1" + "0" * 9]


@pytest.mark.parametrize("number", ODD_NUMBERS)
def test_a_count_of_tokens_that_is_none_costs_no_reply(runs: Any, serve: Any, number: str) -> None:
    said = (
        '{"choices": [{"message": {"content": "8 7"}}], "model": "m", '
        f'"usage": {{"prompt_tokens": {number}, "completion_tokens": {number}}}}}'
    )
    serve(lambda place, before, text: f"raw {said}" if not before and "Q 3?" in text else "")
    scores = judged(runs("a", dollars_per_million_tokens=[1.0, 1.0], max_retries=1))
    assert scores["missing"] == 0 and 0 < scores["asked"]["dollars"] < 0.1


@pytest.mark.parametrize(
    "body",
    [
        "[" * 100_000, '{"choices":' * 90_000, "7", "null", '"x"', "[]", "{}", '{"choices": {}}', '{"choices": [7]}',
        '{"choices": [{"message": null}]}', '{"choices": [{"message": {"content": 7}}]}', "9" * 5000,
        '{"choices": [{"message": {"content": ["8 7"]}}]}', '{"choices": [{"message": "8 7"}]}', "\x00", "\ud7ff",
    ],
    ids=range(16),
)  # fmt: skip
def test_a_body_that_is_no_completion_is_a_reply_that_did_not_come(runs: Any, serve: Any, body: str) -> None:
    serve(lambda place, before, text: f"raw {body}" if "Q 3?" in text else "")
    each = judged(runs("a", max_retries=0))["prompts"]["3"]
    assert each["score"] is None and each["reply"] is None and "no chat completion" in each["problem"]


@pytest.mark.parametrize("around", ['"usage": 7', '"usage": []', '"usage": "x", "model": 7', '"model": {"a": []}'])
def test_what_stands_around_a_reply_costs_no_reply(runs: Any, serve: Any, around: str) -> None:
    server = serve(lambda *_: f'raw {{"choices": [{{"message": {{"content": "8 7"}}}}], {around}}}')
    assert judged(runs("a"))["mean"] == 7 and server.requests == COUNT


def test_half_a_character_in_a_reply_is_kept_shown_and_judged(
    runs: Any, serve: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    said = r'{"choices": [{"message": {"content": "8 7\nso \ud83d"}}], "model": "m\udc00"}'
    server, folder = serve(lambda place, before, text: f"raw {said}" if "Q 3?" in text else ""), runs("a")
    for _ in range(2):
        assert main(["judge", str(folder.root)]) == 0, capsys.readouterr().err
        scores = json.loads(folder.scores.read_text())
        assert scores["prompts"]["3"]["reply"] == "8 7\nso \ufffd" and "m\ufffd" in scores["answered_by"]
        assert folder.report.read_text(encoding="utf-8")
        kept = folder.root.parent / FILE  # as it was written before halves were replaced
        kept.write_bytes(kept.read_bytes().replace("\ufffd".encode(), "\ud83d".encode("utf-8", "surrogatepass")))
    assert server.requests == COUNT


def test_any_line_of_replies_is_read_or_passed_over(tmp_path: Path) -> None:
    whole = json.dumps({"key": "a", "reply": "8 7", "model": "m", "rubric": "r"} | dict.fromkeys(COUNTS, 1))
    half = whole.replace('"a"', '"b"').replace("8 7", "8 7 \ud83d").encode("utf-8", "surrogatepass")
    escaped = whole.replace('"a"', '"c"').replace("8 7", r"8 7 \ud83d").encode()
    lines = [
        b"", b"\x00" * 50, b"\xff", b"[" * 100_000, b"null", b"[]", b"7", b'{"key": [], "reply": "x"}', b'{"key": "d"}',
        b'{"key": "e", "reply": 7}', b'{"key": "f", "reply": "9 9", "model": [], "prompt_tokens": NaN, "new": 1}',
        whole.encode(), half, escaped, whole.encode()[:-9],
    ]  # fmt: skip
    path = tmp_path / FILE
    path.write_bytes(b"\n".join(lines))
    kept = ReplyCache(path)
    assert len(kept) == 4
    assert [kept.get(key).reply for key in "abcf"] == ["8 7", "8 7 \ud83d", "8 7 \ud83d", "9 9"]  # type: ignore[union-attr]
    with kept.locked():
        kept.add(KeptReply("g", "1 2 \ud83d", "m", "r", None, None))
    assert ReplyCache(path).get("g").reply == "1 2 \ud83d"  # type: ignore[union-attr]


# ---- what it may cost


def test_caps_are_checked_before_the_first_request(runs: Any, serve: Any) -> None:
    server = serve()
    with pytest.raises(InputError, match=r"judge.max_requests: 23, but this takes 24 requests.*Nothing was asked"):
        judged(runs("a", max_requests=COUNT - 1))
    with pytest.raises(InputError, match=r"judge.max_dollars: 0.001, but this may cost .*Nothing was asked"):
        judged(runs("b", max_dollars=0.001))
    assert server.requests == 0
    judged(runs("c", model="unheard-of", max_dollars=0.001))  # no price, so only the cap on requests holds
    with pytest.raises(InputError, match=r"judge.max_dollars"):
        judged(runs("d", model="unheard-of", max_dollars=0.001, dollars_per_million_tokens=[1, 2], references=None))


def test_retries_count_and_the_cap_on_requests_holds(runs: Any, serve: Any) -> None:
    server = serve(lambda place, before, text: "status 500" if not before else "")
    folder = runs("a", max_requests=COUNT + 5)
    with pytest.raises(BudgetMissed, match=r"judge.max_requests: 29 requests"):
        judged(folder)
    assert server.requests == COUNT + 5
    scores = judged(runs("a2", max_requests=2 * COUNT))  # beside it: what was answered is there
    assert scores["missing"] == 0 and max(server.answered.values()) == 1


def test_replies_that_never_came_count_as_spent(runs: Any, serve: Any) -> None:
    serve(lambda place, before, text: "half" if before < 3 else "")
    one = 2 * pricing.dollars((1000.0, 1000.0), 500, rubric.MAX_TOKENS[rubric.PAIRWISE])
    folder = runs("a", dollars_per_million_tokens=[1000.0, 1000.0], max_dollars=COUNT * one / 2)
    with pytest.raises(BudgetMissed, match=r"judge.max_dollars"):
        judged(folder)


def test_a_dry_run_asks_and_writes_nothing(runs: Any, serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server, folder = serve(), runs("a")
    before = sorted(path.name for path in folder.root.parent.rglob("*"))
    assert main(["judge", str(folder.root), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "24 requests" in out and "at most 0.0" in out and "gpt-4o-mini" in out and "pairwise" in out
    assert server.requests == 0 and before == sorted(path.name for path in folder.root.parent.rglob("*"))


def test_prices_go_by_model_and_snapshot(runs: Any) -> None:
    section = runs("a").recipe().judge
    assert pricing.price(section.model_copy(update={"model": "gpt-4o-mini-2024-07-18"})) == (0.15, 0.60)
    assert pricing.price(section.model_copy(update={"model": "gpt-4o-mini-audio"})) is None


# ---- nothing secret


def test_the_key_stands_in_no_file_and_no_message(
    runs: Any, serve: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Where the server itself repeats it, in errors and in replies; with every logger at its loudest."""
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx2", "httpcore2", "httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, name)
    said = {"Q 1?": "say 8 7\nyour key is KEY", "Q 2?": "say KEY", "Q 3?": "status 400"}
    server = serve(lambda place, before, text: next((said[q] for q in said if q in text), ""))
    folder = runs("a")
    assert main(["judge", str(folder.root), "judge.concurrency=2"]) == 3
    assert server.keys == {f"Bearer {KEY}"}
    serve(lambda *_: "status 401")
    assert main(["judge", str(folder.root)]) == 2
    spoken = capfd.readouterr()
    assert "your key is [key]" in folder.scores.read_text() and "Incorrect API key provided: [key]" in spoken.err
    written = [path for path in folder.root.parent.rglob("*") if path.is_file()]
    assert len(written) >= 4
    for text in (spoken.out, spoken.err, caplog.text, *(path.read_text(errors="replace") for path in written)):
        assert KEY not in text


def test_an_exception_carries_no_request_along(runs: Any, serve: Any) -> None:
    serve(lambda *_: "status 401")
    with pytest.raises(InputError) as caught:
        judged(runs("a", concurrency=1))
    error: BaseException | None = caught.value
    while error is not None:
        assert KEY not in repr(error) and not hasattr(error, "request")
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("url", [f"http://me:{KEY}@host/v1", f"https://host/v1?key={KEY}", "host/v1", "ftp://host"])
def test_an_address_is_an_address_only(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(InputError, match="OPENAI_BASE_URL") as error:
        address.read()
    assert KEY not in str(error.value)


def test_a_key_that_cannot_stand_in_a_header_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(InputError, match="OPENAI_API_KEY") as error:
        address.read()
    assert KEY not in str(error.value)


def test_a_key_given_as_an_override_is_refused_unseen(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", str(runs("a").root), f"judge.api_key={KEY}"]) == 2
    assert KEY not in (message := capsys.readouterr().err) and "judge.api_key: unknown key" in message


def test_without_a_key_nothing_begins(runs: Any) -> None:
    with pytest.raises(InputError, match="OPENAI_API_KEY: not set"):
        judge_phase.check(runs("a").recipe().judge, [])
    with pytest.raises(InputError, match="OPENAI_API_KEY: not set"):
        judged(runs("b"))


# ---- two orders, single answers, groups, another run


def test_swapped_scores_are_turned_back_and_averaged(runs: Any, serve: Any) -> None:
    server, folder = serve(), runs("a", swap=True)
    scores = judged(folder)
    assert server.requests == 2 * COUNT
    for i in range(COUNT):
        texts = [f"It is {i}.", f"tuned {i}"]
        reference, first = scores_for(rubric.pair(f"Q {i}?", *texts)[-1]["content"])
        second, other = scores_for(rubric.pair(f"Q {i}?", *texts[::-1])[-1]["content"])
        each = scores["prompts"][str(i)]
        assert each["score"] == (first + second) / 2 and each["first_score"] == first
        assert each["reference_score"] == reference
        assert each["swapped"]["score"] == second and each["swapped"]["reference_score"] == other
    ahead = [each["swapped"]["score"] - each["first_score"] for each in scores["prompts"].values()]
    assert scores["swapped"]["order_effect"] == pytest.approx(sum(ahead) / COUNT, abs=1e-4)


def test_one_unreadable_order_makes_the_score_missing(runs: Any, serve: Any) -> None:
    serve(lambda place, before, text: "say no" if "Q 3?" in text and text.index("tuned") < text.index("It is") else "")
    each = judged(runs("a", swap=True))["prompts"]["3"]
    assert each["score"] is None and each["first_score"] is not None and each["swapped"]["reply"] == "no"
    assert "unreadable" in each["problem"]


def test_single_answers_are_labelled(runs: Any, serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    serve()
    folder = runs("a", references=None)
    assert main(["judge", str(folder.root)]) == 0
    scores = json.loads(folder.scores.read_text())
    assert scores["rubric"] == "single-1" and "baselines" not in scores and scores["reference_mean"] is None
    assert "single answer, without references" in capsys.readouterr().out


def test_the_command_scores_by_skill_and_difficulty_and_against_another_run(
    runs: Any, serve: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server, folder, other = serve(), runs("a"), runs("b", words="worse")
    words = ["judge", str(folder.root), "--against", str(other.root)]
    assert main(words) == 0
    out = capsys.readouterr().out
    scores = json.loads(folder.scores.read_text())
    assert set(scores["by_skill"]) == {"Math", "Code"} and set(scores["by_difficulty"]) == {"0", "1", "2"}
    assert sum(each["count"] for each in scores["by_difficulty"].values()) == COUNT
    ours, theirs = expected(folder), expected(other, "worse")
    against = scores["against"]
    assert against["difference"] == pytest.approx(sum(ours[k] - theirs[k] for k in ours) / COUNT, abs=1e-4)
    assert against["wins"] + against["ties"] + against["losses"] == against["count"] == COUNT
    assert against["sentence"] in " ".join(out.split()) and "Math" in out and "baselines" in out
    assert folder.done("judge")["mean"] == scores["mean"]  # type: ignore[index]
    assert not other.scores.exists() and server.requests == 2 * COUNT
    assert main(["judge", str(other.root)]) == 0 and server.requests == 2 * COUNT
    assert main(["judge", str(folder.root), "--against", str(folder.root)]) == 2


def test_the_command_refuses_what_is_no_judges_key(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs("a")
    assert main(["judge", str(folder.root), "lora.r=3"]) == 2 and "only judge.*" in capsys.readouterr().err
    assert main(["judge", str(folder.root), "judge.kind=none"]) == 2 and "names no judge" in capsys.readouterr().err
    folder.pred.unlink()
    assert main(["judge", str(folder.root)]) == 2 and "no answers yet" in capsys.readouterr().err
    folder.pred.write_text("[1]")
    assert main(["judge", str(folder.root)]) == 2 and "holds no JSON object but a list" in capsys.readouterr().err


def test_runs_that_answered_other_questions_are_not_compared(runs: Any, serve: Any) -> None:
    serve()
    folder, other = runs("a"), runs("b")
    other.pred.write_text(other.pred.read_text().replace("Q 3?", "Quite another?"))
    with pytest.raises(InputError, match="prompt '3' is another question"):
        judged(folder, against=other)


# ---- the reference judge


def test_the_reference_judge_measures_text(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    judge = ReferenceJudge()
    same = judge("q", "It is red.", " it is RED ")
    assert same.score == 1 and same.details["rouge_l"] == 1 and same.details["length_ratio"] == 1
    half = judge("q", "the cat sat", "the cat")
    assert half.score == 0 and half.details["rouge_l"] == 0.8 and half.details["length_ratio"] == pytest.approx(0.6667)
    assert 0 < half.details["chrf"] < 1 and judge("q", "abc", "abc").details["chrf"] == 1
    assert judge("q", "abc", "").details == {"exact_match": False, "rouge_l": 0, "chrf": 0, "length_ratio": 0}
    folder = runs("a", kind="reference", base=5)
    assert main(["judge", str(folder.root)]) == 0
    scores = json.loads(folder.scores.read_text())
    assert scores["mean"] == scores["exact_match"] == 0 and scores["chrf"] > 0 and scores["base"]["count"] == 5
    assert "chrF" in capsys.readouterr().out and "A right answer in other words" in scores["notes"][0]


def test_with_a_pattern_the_score_says_whether_all_of_an_answer_has_the_manner(
    runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = ReferenceJudge(r"Aye\. .+\n.+")
    inside = judge("q", "It is red.", "Aye. It is red.\nRust is.")
    assert inside.score == 1 and inside.details["matches"] is True and inside.details["exact_match"] is False
    for answer in ("It is red.", "Aye. It is red.", "Aye. It is red.\nRust is.\nSo it is.", "Well. Aye. Red.\nYes."):
        assert judge("q", "It is red.", answer).score == 0, answer
    folder = runs("a", kind="reference", base=5)
    assert main(["judge", str(folder.root), "judge.pattern=(?s).*"]) == 0
    scores = json.loads(folder.scores.read_text())
    assert scores["mean"] == scores["matches"] == scores["base"]["matches"] == 1 and scores["exact_match"] == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "in the manner 100%" in printed and "exact match 1" not in printed


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("C++", "C", False), ("C#", "C", False), ("5%", "5", False), ("5!", "5", False), ("A*", "A", False),
        ("f(x)", "f(x", False), ("x'", "x", False), ("-", "", False), ("?", "", False), ("$5", "5", False),
        ("Yes!", "yes", True), ("5.", "5", True), ("Paris. ", "paris", True), ("好。", "好", True), ("هل؟", "هل", True),
        ('He said "yes."', 'he said "yes".', True), ("Cafe\u0301", "café", True), ("C++.", "c++", True),
    ],
)  # fmt: skip
def test_an_exact_match_leaves_out_the_end_of_a_sentence_and_no_symbol(answer: str, reference: str, same: bool) -> None:
    assert ReferenceJudge()("q", reference, answer).details["exact_match"] is same


@pytest.mark.parametrize(
    "text", ["今天天气很好。", "Сегодня тепло.", "आज मौसम अच्छा है।", "الطقس جميل", "날씨가 좋다", "วันนี้อากาศดี", "+", "👍"]
)
def test_text_of_any_script_is_like_itself_and_unlike_another(text: str) -> None:
    judge = ReferenceJudge()
    same = judge("q", text, text).details
    assert same["rouge_l"] == 1 and same["length_ratio"] == 1
    half = judge("q", text + " " + text[::-1], text).details
    assert 0.5 < half["rouge_l"] < 1 and judge("q", text, "zzz").details["rouge_l"] == 0


# ---- statistics


def test_the_interval_is_the_normal_one_where_that_holds() -> None:
    """Of 400 draws: mean +- 1.96 s / sqrt(n), which the bootstrap tends to."""
    generator = random.Random(3)
    values = [generator.gauss(5, 2) for _ in range(400)]
    middle = sum(values) / 400
    deviation = (sum((value - middle) ** 2 for value in values) / 400) ** 0.5
    bounds = statistics.interval(values, 0)
    assert bounds is not None and bounds == statistics.interval(values, 0) != statistics.interval(values, 1)
    assert bounds[0] == pytest.approx(middle - 1.96 * deviation / 20, abs=0.02)
    assert bounds[1] == pytest.approx(middle + 1.96 * deviation / 20, abs=0.02)


def test_the_interval_of_a_share_is_the_binomial_ones() -> None:
    """Resampled means of k ones among n are Binomial(n, k/n) / n: its quantiles in closed form."""
    from math import comb

    n, k = 20, 6

    def quantile(level: float) -> float:
        total = 0.0
        for ones in range(n + 1):
            total += comb(n, ones) * (k / n) ** ones * (1 - k / n) ** (n - ones)
            if total >= level:
                return ones / n
        raise AssertionError

    assert statistics.interval([1.0] * k + [0.0] * (n - k), 0) == pytest.approx((quantile(0.025), quantile(0.975)))


def test_few_scores_have_no_interval_and_many_fit_into_memory() -> None:
    assert statistics.interval([1.0] * 9, 0) is None and statistics.interval([3.0] * 10, 0) == (3.0, 3.0)
    assert statistics.summary([0.0] * 50, 0)["low"] is None  # no certainty out of equal scores
    assert statistics.summary([None, None], 0)["mean"] is None and statistics.summary([], 0)["missing_share"] == 0


def test_a_difference_is_noise_or_more() -> None:
    generator = random.Random(1)
    ours = {str(i): generator.gauss(5, 2) for i in range(60)}
    better = {key: value - 0.5 + generator.gauss(0, 0.3) for key, value in ours.items()}
    alike = {key: value + (-1) ** int(key) * generator.random() for key, value in ours.items()}
    more = statistics.compare(ours, better, 0, "b")
    assert more["more_than_noise"] and more["low"] > 0 and more["sentence"].endswith("more than noise.")
    assert "no more than" not in more["sentence"] and "0.5" in more["sentence"]
    less = statistics.compare(better, ours, 0, "b")
    assert less["more_than_noise"] and less["high"] < 0 and " less than b" in less["sentence"]
    noise = statistics.compare(ours, alike, 0, "b")
    assert noise["more_than_noise"] is False and "no more than noise" in noise["sentence"]
    few = statistics.compare({str(i): 9.0 for i in range(5)}, {str(i): 1.0 for i in range(5)}, 0, "b")
    assert few["more_than_noise"] is None and "too few" in few["sentence"] and few["wins"] == 5
    same = statistics.compare(ours, ours, 0, "b")
    assert same["more_than_noise"] is False and "the same as b" in same["sentence"]
    nothing = statistics.compare({"1": None}, {"1": 3.0}, 0, "b")
    assert nothing["count"] == 0 and "nothing to compare" in nothing["sentence"]


# ---- smaller parts


def test_each_kind_that_a_recipe_can_name_is_registered() -> None:
    assert set(KINDS) == set(get_args(JudgeKindName))


def test_equal_items_are_judged_once_and_an_error_stops_the_rest() -> None:
    calls: list[str] = []
    stopped = threading.Event()

    def judge(question: str, reference: str | None, answer: str) -> Judgment:
        calls.append(answer)
        if answer == "bad":
            raise InputError("no")
        if answer.isdecimal():  # after the error: in hand until the rest is taken away
            stopped.wait(PATIENCE)
            time.sleep(0.001)
        return Judgment(1.0)

    items = [Item("q", None, "a"), Item("q", None, "b"), Item("q", None, "a")]
    assert len(judge_all(judge, items)) == 2 and sorted(calls) == ["a", "b"]
    rest = [Item("q", None, str(i)) for i in range(500)]
    with pytest.raises(InputError):
        judge_all(judge, [Item("q", None, "bad"), *rest], 1, lambda: threading.Timer(0.1, stopped.set).start())
    assert stopped.is_set() and len(calls) < 500


def test_verdicts_survive_half_a_line_and_odd_text(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(b'{"key": "cut')
    verdicts = ReplyCache(path)
    odd = KeptReply("k", "8 7\n\ud800 \u2028 é", "m", "r", 1, None)
    with verdicts.locked():
        verdicts.add(odd)
    assert ReplyCache(path).get("k") == odd and len(ReplyCache(path)) == 1
    assert ReplyCache(tmp_path / "new", [path]).get("k") == odd


def test_two_commands_wait_for_each_other(tmp_path: Path) -> None:
    """The second sees what the first has asked."""
    path = tmp_path / FILE
    first = ReplyCache(path)
    code = f"""
from pathlib import Path
from fast_ft.judge.reply_cache import ReplyCache
verdicts = ReplyCache(Path({str(path)!r}))
with verdicts.locked():
    print(len(verdicts))
"""
    with first.locked():
        # No fork: a child would inherit the lock itself.
        second = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert second.stderr is not None and "waiting for it" in second.stderr.readline()
        first.add(KeptReply("k", "8 7", "m", "r", None, None))
    assert second.communicate(timeout=PATIENCE)[0] == "1\n"
