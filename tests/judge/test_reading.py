"""A judge's reply is read where it can mean one thing only; whatever is ambiguous gives no score."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_ft.judge import reading

#: What two scores look like: {} and {} are the first and the second.
FORMS = [
    "{} {}",
    "{}, {}",
    "**{}** **{}**",
    "{}/10 {}/10",
    "({}, {})",
    "[[{}]] [[{}]]",
    "[[{}]][[{}]]",
    "[{}, {}]",
    "[[{}, {}]]",
    "Scores: {} {}",
    "Final scores:\n{} {}",
    "**Rating:** [[{}]] [[{}]]",
    "Reference: {} / Answer: {}",
    "**Reference:** {}/10\n**Answer:** {}/10",
    "Answer 1: {}\nAnswer 2: {}",
    "- **Answer 1:** {}\n\n- **Answer 2:** {}",
    "### Score of answer 1: {}\n### Score of answer 2: {}",
    "Assistant 1: {}, Assistant 2: {}.",
    "A: {}; B: {}",
    "Answer 1: [[{}]]\nAnswer 2: [[{}]]",
    '{{"reference": {}, "answer": {}}}',
    '{{"answer_1": {}, "answer_2": {}, "reasons": "The first says 3 things."}}',
    '{{\n  "assistant1Score": "{}/10",\n  "assistant2Score": "{}"\n}}',
    '{{"scores": {{"Answer 1": {{"score": {}, "why": "short"}}, "Answer 2": {{"score": {}, "why": "long"}}}}}}',
    '{{"scores": [{}, {}]}}',
]
AROUND = [
    "{}",
    "```\n{}\n```",
    "```json\n{}\n```\nThe first is better.",
    "~~~\n{}\n~~~",
    "<think>\nThe first is a 3, or 4 4?\n</think>\n\n{}",
    "<thinking>6 6</thinking><think>5</think>{}\nBecause of 2 faults.",
    "I would say 3 3.\n</think>\n{}",
    "\n  {}\nThe first names 3 of 4 causes, the second 2.",
]
PAIRS = st.tuples(*[st.integers(1, 10).map(str) | st.sampled_from(["8.5", "1.0", "9.25"])] * 2)
BROKEN = [
    "", "  \n ", "8", "8 11", "0 5", "8 7 6", "8/10", "-3 5", "nan 5", "8 7 ok", "Good.\n8 7", "8/7", "8-9 7",
    "8,5 7,5", "9\n7", "1. 9\n2. 7", "Both get an 8.", "8/10 for both", "[8]", "[[8]]", "[8, 7, 6]", "[[A]]",
    "Answer 1: 9",
    "Answer 2: 7", "Answer 1: 9 / Answer: 7", "Answer 1: 9\nReference: 7", "Answer 1: 9\nAnswer 2: 7\nAnswer 1: 8",
    "Answer 1: 9, Answer 2: 7, Answer 3: 8", "Helpfulness: 8\nAccuracy: 7", "Answer 1: 8 - good, Answer 2: 7",
    "Answer 1: 8 or 9\nAnswer 2: 7", "Answer 1: 9 Answer 2: seven", '{"answer": 7}', '{"answer_1": 9}',
    '{"answer_1": 9, "answer_1": 8, "answer_2": 7}', '{"answer_1": true, "answer_2": 7}',
    '{"answer_1": 9, "answer_2": 7',
    '{"answer_1": NaN, "answer_2": 7}', '{"answer_1": 9, "answer_2": 70}', '{"answer_1": 9, "answer_2": [7, 8]}',
    '{"answer_1": 9, "answer_2": 7} or {"answer_1": 8, "answer_2": 7}', '{"score": 8}', '{"a": 9, "first": 8, "b": 7}',
    '{"answer_1": ' + "9" * 400 + ', "answer_2": 7}', "9" * 400 + " 7", "<think>9 7", "<think>8</think>9 7</think>8 8",
    "9 7\n8 8", "9 7\n7 9", "9 7\nOn reflection, final scores: 6 5", "[[9]] [[7]]\nNo: [[6]] and [[5]]",
    "9 7\nAnswer 1: 7\nAnswer 2: 9", "```\n9 7\n```\n```\n8 8\n```", '9 7\n{"answer_1": 7, "answer_2": 9}',
    "Answer 1: 9\nAnswer 2: 7\nSo:\n7 9", "I'm sorry, but I can't judge 2 answers.",
]  # fmt: skip


@given(PAIRS, st.sampled_from(FORMS), st.sampled_from(AROUND))
@settings(max_examples=100)
def test_scores_in_any_known_form_are_read(pair: tuple[str, str], form: str, around: str) -> None:
    assert reading.read(around.format(form.format(*pair)), 2) == (float(pair[0]), float(pair[1]))


def test_labels_count_more_than_their_order() -> None:
    assert reading.read("Answer 2: 7\nAnswer 1: 9", 2) == reading.read("Answer: 7 / Reference: 9", 2) == (9, 7)
    assert reading.read('{"answer": 7, "reference": 9}', 2) == (9, 7)


def test_a_part_that_the_question_did_not_name_is_no_label() -> None:
    """With the answers in the other order, nothing tells the judge which of them is the reference."""
    said = reading.read("Reference: 9 / Answer: 7", 2, reference_first=False)
    assert isinstance(said, str) and "did not name" in said
    assert reading.read("Answer 1: 9\nAnswer 2: 7", 2, reference_first=False) == (9, 7)


@pytest.mark.parametrize("reply", BROKEN)
def test_what_can_mean_two_things_gives_no_score(reply: str) -> None:
    assert isinstance(reading.read(reply, 2), str)


@given(PAIRS, PAIRS, st.sampled_from(FORMS), st.sampled_from(FORMS), st.sampled_from(["", "No, wait.\n", "\n\n"]))
@settings(max_examples=100)
def test_a_reply_that_contradicts_itself_gives_no_score(
    one: tuple[str, str], other: tuple[str, str], form: str, again: str, between: str
) -> None:
    if [float(each) for each in one] == [float(each) for each in other]:
        return
    assert isinstance(reading.read(f"{form.format(*one)}\n{between}{again.format(*other)}", 2), str)


@given(PAIRS, st.sampled_from(FORMS), st.sampled_from(AROUND), st.floats(0, 1))
@settings(max_examples=150)
def test_a_reply_cut_anywhere_gives_its_own_scores_or_none(
    pair: tuple[str, str], form: str, around: str, share: float
) -> None:
    whole = around.format(form.format(*pair))
    found = reading.read(whole[: int(share * len(whole))], 2, cut=True)
    assert isinstance(found, str) or found == (float(pair[0]), float(pair[1]))


PIECES = ["8", "10", "7.5", "11", "0", " ", "\n", ":", "/", ",", "[[", "]]", "{", "}", '"', "Answer 1", "Answer 2",
          "Answer", "Reference", "Score", "<think>", "</think>", "```", "**", "and", "-", "json",
          '"answer_1"', "."]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=14).map("".join), st.sampled_from([1, 2]))
@settings(max_examples=300)
def test_any_text_gives_scores_that_stand_in_it_or_a_sentence(reply: str, count: int) -> None:
    found = reading.read(reply, count)
    if isinstance(found, str):
        assert found
        return
    there = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", reply)]
    for score in (found.second,) if count == 1 else found:
        assert score is not None and 1 <= score <= 10
        there.remove(score)  # each score has a number of its own in the reply
    assert (found.first is None) == (count == 1)


@pytest.mark.parametrize(
    "reply", ["8", "8/10\nx", "Score: 8", "**Score:** 8/10", "[[8]]", "[8]", '{"score": 8}', "Answer: 8", "```\n8\n```"]
)
def test_the_single_rubric_reads_one_number(reply: str) -> None:
    assert reading.read(reply, 1) == (None, 8)


@pytest.mark.parametrize(
    "reply", ["8 7", "8\n7", "Answer 1: 8", "Reference: 8", '{"score": 8, "rating": 7}', "8\nFinal score: 7", "8 or 9"]
)
def test_the_single_rubric_takes_nothing_else(reply: str) -> None:
    assert isinstance(reading.read(reply, 1), str)


def test_a_reply_made_to_be_slow_is_read_soon() -> None:
    long = 60_000
    for reply in ("a" + " " * long, "score:" + "*" * long, "8 7\n" + "{" * long, "8 7\n" + '{"a":' * (long // 5),
                  "8 7\n" + "score " * (long // 6), "<think>" * 9000, "8 7\n[[8" + "\n" * long, "x</think>" * 7000,
                  "8 7\n" + json.dumps([[]] * 9000)):  # fmt: skip
        started = time.process_time()
        reading.read(reply, 2)
        assert time.process_time() - started < 10, "a pattern that begins again at each character takes minutes"
