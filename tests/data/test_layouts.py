"""Any row becomes messages, and no text of it is lost: fields beside the known ones, flags of a turn, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fast_ft.common.errors import InputError
from fast_ft.data.dataset import load_pool, load_prompts, load_references
from fast_ft.data.examples import Example, Message
from fast_ft.data.formats import alpaca_prompt
from fast_ft.recipe.schema import Data

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello."}
PAIR = [("user", "Hi"), ("assistant", "Hello.")]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}


def load(folder: Path, *rows: Any, **keys: Any) -> list[Example]:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    pool = load_pool(Data(train=str(path), **keys))
    return pool.examples(range(len(pool)))


def said(row: Example) -> list[tuple[str, str]]:
    return [(each.role, each.content) for each in row.messages]


READ: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "Alpaca of LLaMA-Factory": (
        {"instruction": "C?", "output": "3", "system": "S", "history": [["A?", "1"], ["B?", "2"]]},
        [("system", "S"), ("user", "A?"), ("assistant", "1"), ("user", "B?"), ("assistant", "2"),
         ("user", alpaca_prompt("C?", "")), ("assistant", "3")],
    ),
    "Dolly": (
        {"instruction": "When?", "context": "In 2000.", "response": "2000"},
        [("user", alpaca_prompt("When?", "In 2000.")), ("assistant", "2000")],
    ),
    "context of a prompt": (
        {"prompt": "When?", "context": "In 2000.", "completion": "2000"},
        [("user", "When?\n\nIn 2000."), ("assistant", "2000")],
    ),
    "empty fields beside": (
        {"prompt": "Hi", "response": "Hello.", "system": " ", "context": "", "history": [], "tools": "", "input": None},
        PAIR,
    ),
    "system of ShareGPT": (
        {"system": "S", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        [("system", "S"), *PAIR],
    ),
    "system_prompt": ({"system_prompt": "S", "messages": [HI, HELLO]}, [("system", "S"), *PAIR]),
    "the system text twice": (
        {"system": "S", "messages": [{"role": "system", "content": "S"}, HI, HELLO]}, [("system", "S"), *PAIR],
    ),
    "a system turn within": (
        {"messages": [HI, HELLO, {"role": "system", "content": "S"}, HI, HELLO]}, [*PAIR, ("system", "S"), *PAIR],
    ),
    "OpenAI's developer": (
        {"messages": [{"role": "developer", "content": "S"}, HI, HELLO]}, [("system", "S"), *PAIR],
    ),
    "text parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]}]},
        PAIR,
    ),
    "TRL's lists of turns": ({"prompt": [HI], "completion": [HELLO]}, PAIR),
    "a tool's turn": (
        {"messages": [HI, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                      {"role": "tool", "content": "blue"}, HELLO]},
        [("user", "Hi"), ("assistant", ""), ("tool", "blue"), ("assistant", "Hello.")],
    ),
    "a call of LLaMA-Factory": (
        {"conversations": [{"from": "human", "value": "Hi"},
                           {"from": "function_call", "value": json.dumps(CALL["function"])},
                           {"from": "observation", "value": "blue"}, {"from": "gpt", "value": "Hello."}]},
        [("user", "Hi"), ("assistant", ""), ("tool", "blue"), ("assistant", "Hello.")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_what_is_plain_is_read(case: str, suffix: str, tmp_path: Path) -> None:
    row, turns = READ[case]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
        pool = load_pool(Data(train=str(tmp_path / "rows.parquet")))
        (found,), notes = pool.examples([0]), pool.notes
    else:
        (found,), notes = load(tmp_path, row), ()
    assert said(found) == turns
    assert [each.trained for each in found.messages] == [each.role == "assistant" for each in found.messages]
    assert found.prompt == "\n\n".join(text for role, text in turns if role in ("system", "user")) and not notes


def test_calls_and_tools_keep_their_form(tmp_path: Path) -> None:
    told = {"from": "function_call", "value": json.dumps(CALL["function"])}
    rows = [
        {"conversations": [{"from": "human", "value": "Hi"}, told], "tools": '[{"name": "look"}]'},
        {"messages": [HI, {**HELLO, "tool_calls": [CALL], "reasoning_content": "Up."}], "tools": [{"name": "look"}]},
    ]
    first, second = load(tmp_path, *rows)
    assert first.messages[1].more == {"tool_calls": [CALL]} and first.tools == second.tools == ({"name": "look"},)
    assert second.messages[1].more == {"tool_calls": [CALL], "reasoning_content": "Up."}
    assert json.loads(first.response) == [CALL] and second.response == "Hello."
    assert len({first.digest, second.digest, Example.exchange("x", "Hi", "Hello.").digest}) == 3


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "two system texts": (
        {"system": "S", "messages": [{"role": "system", "content": "T"}, HI, HELLO]}, ["system", "first turn"],
    ),
    "system and system_prompt": ({"system": "S", "system_prompt": "T", "messages": [HI, HELLO]}, ["system_prompt"]),
    "a system that is no text": ({"system": ["S"], "messages": [HI, HELLO]}, ["system", "is not text (list)"]),
    "input and context": ({"instruction": "A", "input": "B", "context": "C", "output": "D"}, ["input and context"]),
    "context beside turns": ({"messages": [HI, HELLO], "context": "C"}, ["context", "place in messages is not known"]),
    "history beside turns": ({"messages": [HI, HELLO], "history": [["a", "b"]]}, ["history", "place in messages"]),
    "a history of texts": ({"prompt": "a", "response": "b", "history": ["c"]}, ["history[0]", "[question, answer]"]),
    "tools that are no JSON": ({"messages": [HI, HELLO], "tools": "look()"}, ["tools", "no JSON"]),
    "tools that are texts": ({"messages": [HI, HELLO], "tools": ["look"]}, ["tools", "no list of functions"]),
    "pictures": ({"messages": [HI, HELLO], "images": ["a.png"]}, ["images", "only text is trained"]),
    "a picture's part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, HELLO]},
        ["messages[0].content", "'image_url'"],
    ),
    "half a weight": ({"messages": [HI, {**HELLO, "weight": 0.5}]}, ["messages[1].weight", "0.5 is neither 0 nor 1"]),
    "a weight that is text": ({"messages": [HI, {**HELLO, "weight": "0"}]}, ["messages[1].weight", "'0'"]),
    "a trained question": ({"messages": [{**HI, "train": True}, HELLO]}, ["messages[0].train", "user turn"]),
    "parts of a turn": ({"messages": [HI, {**HELLO, "train_detail": [{"x": 1}]}]}, ["messages[1].train_detail"]),
    "no loss left": ({"messages": [HI, {**HELLO, "weight": 0}]}, ["its loss", "no answer is trained", "leave the row"]),
    "an empty answer among others": (
        {"messages": [HI, {**HELLO, "content": ""}, HI, HELLO]}, ["its turn 2", "an empty answer", "train: false"],
    ),
    "an empty question within": ({"messages": [HI, HELLO, {**HI, "content": " "}, HELLO]}, ["its prompt", "empty"]),
    "a call that is no JSON": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "look()"}]},
        ["conversations[1].value", "no JSON of a call"],
    ),
    "too deep a field": (
        {"messages": [HI, HELLO], "tools": json.loads("[" * 300 + "{}" + "]" * 300)}, ["the row", "over 50 levels"],
    ),
    "lists and texts of turns": ({"prompt": [HI], "completion": "Hello."}, ["completion", "list of turns in both"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_plain_is_refused_by_row_and_field(case: str, tmp_path: Path) -> None:
    row, words = REFUSED[case]
    with pytest.raises(InputError) as caught:
        load(tmp_path, {"messages": [HI, HELLO]}, row)
    message = str(caught.value)
    assert "rows.json, row 2, " in message and "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}]
)
def test_a_turn_can_be_left_without_loss(flag: dict[str, Any], tmp_path: Path) -> None:
    bad, good = {**HELLO, "content": "BAD.", **flag}, {**HELLO, "weight": 1, "train": True}
    (row,) = load(tmp_path, {"messages": [HI, bad, HI, good]})
    assert [(each.content, each.trained) for each in row.messages[1::2]] == [("BAD.", False), ("Hello.", True)]
    assert row.response == "Hello." and row.messages[1].more == {}
    other = {"messages": [HI, {**HELLO, "content": "BAD."}, HI, good]}
    assert load(tmp_path, other)[0].digest != row.digest
    with pytest.raises(InputError, match=r"row 1, its loss"):
        load(tmp_path, {"messages": [HI, HELLO, HI, bad]}, train_on="last")


def test_text_that_is_not_used_is_named_once_with_its_count(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": str(n), "messages": [HI, HELLO], "topic": "" if n else "greetings", "source": {"url": f"u{n}"}, "n": n}
        for n in range(3)
    ]
    expected = [
        "what the field 'source' holds is not used (3 rows).", "what the field 'topic' holds is not used (1 row).",
    ]  # fmt: skip
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert list(load_pool(Data(train=str(path))).notes) == [f"{path}: {text}" for text in expected]
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table)
    assert list(load_pool(Data(train=str(table))).notes) == [f"{table}: {text}" for text in expected]
    notes: list[str] = []
    load_prompts(str(path), notes=notes)
    assert notes == [f"{path}: {text}" for text in expected]
    path.write_text(json.dumps([{"messages": [{**HI, "mood": True}, HELLO]}]))
    assert load_pool(Data(train=str(path))).notes == (
        f"{path}: what the field 'messages[].mood' holds is not used (1 row).",
    )


def test_arrows_nulls_are_absent_keys(tmp_path: Path) -> None:
    """Arrow gives every call the arguments of all calls; those that a call never had would be rendered as null."""
    calls = [{"role": "assistant", "content": "x", "tool_calls": [{"name": "f", "arguments": {k: k}}]} for k in "ab"]
    pq.write_table(pa.Table.from_pylist([{"messages": [HI, call]} for call in calls]), tmp_path / "rows.parquet")
    pool = load_pool(Data(train=str(tmp_path / "rows.parquet")))
    found = [row.messages[1].more["tool_calls"][0]["arguments"] for row in pool.examples([0, 1])]
    assert found == [{"a": "a"}, {"b": "b"}]


def test_a_table_with_more_than_questions_and_answers_is_read_row_by_row(tmp_path: Path) -> None:
    turns = [[HI, {**HELLO, "weight": 0}, HI, HELLO], [HI, HELLO]]
    table = pa.table({"id": ["a", "b"], "messages": turns, "system": ["S", None]})
    pq.write_table(table, tmp_path / "rows.parquet")
    pool = load_pool(Data(train=str(tmp_path / "rows.parquet")))
    first, second = pool.examples([0, 1])
    assert [each.trained for each in first.messages] == [False, False, False, False, True]
    assert said(second) == PAIR and pool.exchanges() == [False, True] and pool.metrics == ["score"]


def test_prompts_keep_system_turns_in_their_place(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    system = {"role": "system", "content": "S"}
    path.write_text(
        json.dumps([{"id": "a", "messages": [HI, HELLO, system, HI]}, {"id": "b", "system": "T", "prompt": "Q"}])
    )
    first, second = load_prompts(str(path))[0]
    assert list(first.messages) == [HI, HELLO, system, HI] and first.text == "Hi" and first.all_text == "Hi\n\nS\n\nHi"
    assert list(second.messages) == [{"role": "system", "content": "T"}, {"role": "user", "content": "Q"}]
    for turns, words in (([HI, HELLO, system], "a system turn"), ([system], "a system turn"), ([HELLO], "out of turn")):
        path.write_text(json.dumps([{"id": "a", "messages": turns}]))
        with pytest.raises(InputError, match=words):
            load_prompts(str(path))


def test_the_reference_is_the_last_answer(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": "a", "messages": [HI, {**HELLO, "content": "No."}, HI, HELLO]}]))
    assert load_references(str(path)).by_id == {"a": "Hello."}


def test_a_row_keeps_its_digest_where_it_is_one_question_and_one_answer() -> None:
    """Manifests and ledgers of older runs hold it."""
    row = Example.exchange("a", "Hi", "Hello.")
    assert row.digest == "ee3c14e47532c2fb0d8fa6f6f372a524ba1ddea357a612d217f413dc9b6decd7"
    system = Example("a", (Message("system", "S"), *row.messages), None)
    assert system.digest != Example.exchange("a", "S\n\nHi", "Hello.").digest
