"""data/dataset.py, data/formats.py, data/sources.py: the same rows in any layout, and one clear message for each kind
of bad input.
"""

import json
import pickle
import sys
import time
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fast_ft.common.errors import InputError
from fast_ft.data.dataset import load_pool, load_prompts, load_references, refuse_test_as_train
from fast_ft.data.examples import Example
from fast_ft.data.formats import strip_lead
from fast_ft.recipe.schema import Data

SHARED = Path(__file__).parents[3] / "shared" / "data"
LEAD = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request. "
WITH_INPUT = ", paired with an input that provides further context"
#: id, instruction, input, output, score
ROWS = [
    ("a", "Name a river.", "", "The Rhine.", 4.5),
    ("b", "Add the numbers.", "1 and 2", "3\n\nThat is all.", None),
    ("c", "Say hello.", "", "Hello — 你好!", 3.0),
]


def prompt(instruction, input_):
    text = LEAD.format(WITH_INPUT if input_ else "") + f"### Instruction: {instruction}"
    return text + (f" ### Input: {input_}" if input_ else "")


def fastchat(rows=ROWS):
    turns = [[{"from": "human", "value": prompt(i, x)}, {"from": "gpt", "value": o}] for _, i, x, o, _ in rows]
    return [{"id": row[0], "conversations": turn, "score": row[4]} for row, turn in zip(rows, turns, strict=True)]


def chat(rows=ROWS):
    return [
        {
            "id": id_,
            "messages": [{"role": "user", "content": prompt(i, x)}, {"role": "assistant", "content": o}],
            "score": s,
        }
        for id_, i, x, o, s in rows
    ]


def stanford(rows=ROWS):
    return [{"id": id_, "instruction": i, "input": x, "output": o, "score": s} for id_, i, x, o, s in rows]


def plain(rows=ROWS):
    return [{"id": id_, "prompt": f"  {prompt(i, x)}\n", "response": f"\n{o} ", "score": s} for id_, i, x, o, s in rows]


def write(path, rows):
    """Write rows as the path's suffix says; without one, as datasets.save_to_disk does, in two shards."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.mkdir()
        table = pa.Table.from_pylist(rows)
        names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
        for name, shard in zip(names, (table.slice(0, 1), table.slice(1)), strict=True):
            with pa.OSFile(str(path / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(shard)
        (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return path


def load(path, **keys):
    return load_pool(Data(train=str(path), **keys))


def refused(path, *words, **keys):
    """Check that loading is refused in one message that holds all the words."""
    with pytest.raises(InputError) as caught:
        load(path, **keys)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize("layout", [fastchat, chat, stanford, plain])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ""])
def test_the_same_rows_in_any_layout_give_the_same_examples(tmp_path, layout, suffix):
    pool = load(write(tmp_path / f"rows{suffix}", layout()))
    assert pool.examples(range(3)) == [Example.exchange(id_, prompt(i, x), o, s) for id_, i, x, o, s in ROWS]
    assert pool.table.column_names == ["id", "messages", "prompt", "response", "score"]
    assert pool.examples([2, 0])[0].id == "c"


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(), st.text(), st.one_of(st.none(), st.floats(allow_nan=True))), min_size=1))
def test_the_short_cut_for_arrow_says_what_the_rows_say(tmp_path, rows):
    """regular_columns() and parse_row() agree on every text, also in that they refuse it."""
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r, _ in rows]
    made = [
        {"id": str(n), "conversations": turn, "score": row[2]}
        for n, (turn, row) in enumerate(zip(turns, rows, strict=True))
    ]
    table = pa.table(
        {
            "id": [row["id"] for row in made],
            "conversations": [row["conversations"] for row in made],
            "score": pa.array([row["score"] for row in made], pa.float64(), from_pandas=False),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(made), encoding="utf-8")
    answers = []
    for name in ("rows.parquet", "rows.json"):
        try:
            pool = load(tmp_path / name)
            answers.append([(e.id, e.prompt, e.response, e.score) for e in pool.examples(range(len(pool)))])
        except InputError as error:
            answers.append(str(error).replace(name, ""))
    assert answers[0] == answers[1]


def test_ids_are_given_by_row_number_and_digests_do_not_hold_them(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "id"} for row in stanford()]
    examples = load(write(tmp_path / "rows.json", rows)).examples(range(3))
    assert [example.id for example in examples] == ["row-1", "row-2", "row-3"]
    assert examples[0].digest == Example.exchange("z", prompt("Name a river.", ""), "The Rhine.").digest
    assert len({example.digest for example in examples}) == 3
    assert load(write(tmp_path / "numbered.json", [{**stanford()[0], "id": 7}])).examples([0])[0].id == "7"


def test_rows_inside_an_object_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"data": fastchat()}).encode())
    assert len(load(path)) == 3
    assert len(load(write(tmp_path / "one.jsonl", fastchat(ROWS[:1])))) == 1


def test_folders_as_the_hub_leaves_them(tmp_path):
    (tmp_path / "data").mkdir()
    for n in range(2):
        write(tmp_path / "data" / f"train-0000{n}-of-00002.parquet", fastchat(ROWS[n : n + 1]))
    write(tmp_path / "data" / "test-00000-of-00001.parquet", fastchat(ROWS[2:]))
    assert [example.id for example in load(tmp_path).examples([0, 1])] == ["a", "b"]
    assert [prompt.id for prompt in load_prompts(str(tmp_path))[0]] == ["c"]


def test_a_dataset_dict_gives_its_train_split(tmp_path):
    (tmp_path / "both").mkdir()
    for split in ("train", "validation"):
        write(tmp_path / "both" / split, fastchat())
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert len(load(tmp_path / "both")) == 3
    with pytest.raises(InputError, match="none called test"):
        load_prompts(str(tmp_path / "both"))


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_row_of_several_turns_keeps_all_of_them(tmp_path, suffix):
    said = [("system", "Be short."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    rows = [{"id": "m", "messages": [{"role": role, "content": text} for role, text in said]}]
    path = write(tmp_path / f"rows{suffix}", rows)
    (row,) = load(path).examples([0])
    assert [(each.role, each.content) for each in row.messages] == said
    assert [each.content for each in row.messages if each.trained] == ["1", "2"]
    assert (row.prompt, row.response) == ("Be short.\n\nOne?\n\nTwo?", "1\n\n2")
    (last,) = load(path, train_on="last").examples([0])
    assert [each.content for each in last.messages if each.trained] == ["2"] and last.response == "2"
    assert last.messages[:2] == row.messages[:2] and last.digest != row.digest
    prompt = load_prompts(str(path))[0][0]
    assert [turn["role"] for turn in prompt.messages] == ["system", "user", "assistant", "user"]


def test_an_empty_response_loads_and_a_missing_one_does_not(tmp_path):
    rows = stanford()
    rows[1]["output"] = "  "
    assert load(write(tmp_path / "rows.json", rows)).examples([1])[0].response == ""
    del rows[1]["output"]
    refused(write(tmp_path / "none.json", rows), "row 2", "response", "missing")
    refused(write(tmp_path / "none.parquet", rows), "row 2", "response", "missing")
    refused(write(tmp_path / "all.json", [{**stanford()[0], "output": ""}]), "every response is empty")


BAD_ROWS = {
    "response is a number": ([{"prompt": "a", "response": 5}], ["row 1", "response", "'5' is not text (int)"]),
    "value is a list": ([{"conversations": [{"from": "human", "value": [1]}]}], ["row 1", "conversations[0].value"]),
    "no answer": ([fastchat()[0], {"conversations": [{"from": "human", "value": "x"}]}], ["row 2", "response"]),
    "null answer": (
        [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]}],
        ["row 1", "messages[1].content", "missing"],
    ),
    "empty prompt": ([{"instruction": " ", "output": "x"}], ["row 1", "prompt", "empty"]),
    "score is text": ([{**fastchat()[0], "score": "abc"}], ["row 1", "score", "'abc' is no number"]),
    "score is true": ([{**fastchat()[0], "score": True}], ["row 1", "score", "True is no number"]),
    "score is NaN": ([fastchat()[0], {**fastchat()[1], "score": float("nan")}], ["row 2", "score", "nan"]),
    "score is huge": ([{**fastchat()[0], "score": 10**400}], ["row 1", "score"]),
    "same id": ([fastchat()[0], fastchat()[1], fastchat()[0]], ["row 3", "id", "'a' is also row 1's"]),
    "id is a list": ([{**fastchat()[0], "id": ["a"]}], ["row 1", "id"]),
    "unknown layout": ([{"question": "a", "reply": "b"}], ["row 1", "question, reply", "instruction, input, output"]),
    "a row is text": (["hello"], ["row 1", "not an object (str)"]),
    "unknown role": ([{"messages": [{"role": "poet", "content": "x"}]}], ["messages[0].role", "'poet'", "assistant"]),
    "a tool speaks first": ([{"messages": [{"role": "tool", "content": "x"}]}], ["messages[0].role", "out of turn"]),
    "out of turn": ([{"messages": [{"role": "assistant", "content": "x"}]}], ["messages[0].role", "out of turn"]),
    "turn is text": ([{"messages": ["hi"]}], ["messages[0]", "is no turn"]),
    "no turns": ([{"messages": []}], ["row 1", "messages", "no list of turns"]),
    "half a surrogate": ([{"prompt": "a", "response": "\ud800"}], ["row 1", "response", "surrogate"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, case):
    rows, words = BAD_ROWS[case]
    refused(write(tmp_path / "rows.json", rows), *words)


def test_bad_rows_in_arrow_are_named_too(tmp_path):
    rows = fastchat()
    refused(write(tmp_path / "twice", [*rows, rows[0]]), "row 4", "'a' is also row 1's")
    refused(write(tmp_path / "nan", [{**rows[0], "score": float("nan")}, rows[1]]), "row 1", "score")
    refused(write(tmp_path / "text.parquet", [{**rows[0], "score": "high"}]), "row 1", "'high' is no number")
    refused(write(tmp_path / "odd.parquet", [{"text": "a"}]), "keys found: text")
    table = pa.table({"prompt": pa.array([b"\xff\xfe"]).view(pa.string()), "response": ["a"]})
    pq.write_table(table, tmp_path / "bytes.parquet")
    refused(tmp_path / "bytes.parquet", "not valid Arrow data")


BAD_FILES = {
    "empty": (b"", ["the file is empty"]),
    "blank": (b" \n ", ["the file is empty"]),
    "no rows": (b"[]", ["no rows"]),
    "truncated list": (json.dumps(fastchat(), indent=1).encode()[:-30], ["line ", "column ", "not valid JSON"]),
    "truncated lines": (b'{"prompt": "a", "response": "b"}\n{"prompt": "a"', ["line 2, column 15", "not valid JSON"]),
    "a number": (b"12", ["no rows but one value (int)"]),
    "an endless list": (b"[" * 200_000, ["not usable JSON"]),
    "latin-1": ('[{"prompt": "é"}]'.encode("latin-1"), ["not UTF-8"]),
    "utf-16": ("[]".encode("utf-16"), ["not UTF-8"]),
    "binary": (b"\x01\x02\x00\x03", ["a binary file"]),
    "pickle": (pickle.dumps([1]), ["a pickle", "run code"]),
    "torch": (b"PK\x03\x04rest", ["zip archive"]),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", ["git lfs pull"]),
    "cut parquet": (b"PAR1" + b"\x00" * 40, ["cannot be read"]),
    "cut arrow": (b"\xff\xff\xff\xff" + b"\x10\x00\x00\x00", ["cannot be read"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_in_one_message(tmp_path, case):
    content, words = BAD_FILES[case]
    (tmp_path / "rows.json").write_bytes(content)
    refused(tmp_path / "rows.json", *words)


def test_bad_paths(tmp_path):
    refused(tmp_path / "gone.json", "no such file or folder", "hub id")
    refused("data/fastchat_alpaca_52k", "git clone")
    with pytest.raises(InputError) as caught:
        load_pool(Data(train="data/my_rows.json"))
    assert "no such file" in str(caught.value) and "homework" not in str(caught.value)
    refused(tmp_path, "a folder without data")
    (tmp_path / "rows.bin").write_bytes(b"[]")
    refused(tmp_path / "rows.bin", "pickle")
    write(tmp_path / "a.json", fastchat()), write(tmp_path / "b.json", fastchat())
    refused(tmp_path, "several data files")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"recipe_digest": "0"}')
    (tmp_path / "run" / "verdicts.jsonl").write_text('{"prompt": "What?", "response": "That."}\n')
    refused(tmp_path / "run", "the folder of a run, which holds answers and no rows")
    (tmp_path / "run" / "manifest.json").unlink()
    refused(tmp_path / "run", "a folder without data")
    saved = write(tmp_path / "saved", fastchat())
    (saved / "data-00001-of-00002.arrow").unlink()
    refused(saved, "data-00001-of-00002.arrow", "Copy the whole folder")
    (saved / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"state.json: cannot be read"):
        load(saved)


def test_a_cut_arrow_shard(tmp_path):
    saved = write(tmp_path / "saved", fastchat())
    shard = saved / "data-00001-of-00002.arrow"
    shard.write_bytes(shard.read_bytes()[:-200])
    refused(saved, "cannot be read")


def test_prompts_keep_order_and_drop_answers(tmp_path):
    prompts, digest = load_prompts(str(write(tmp_path / "rows.json", fastchat())))
    assert [(p.id, p.text) for p in prompts] == [(id_, prompt(i, x)) for id_, i, x, _, _ in ROWS]
    assert prompts[0].messages == ({"role": "user", "content": prompt("Name a river.", "")},)
    assert digest == load(tmp_path / "rows.json").digest


def test_wizardlm_prompts_keep_skill_and_difficulty(tmp_path):
    rows = [{"idx": 1, "Skill": "Math", "Difficulty": 6, "Instruction": "Add."}, {"idx": 2, "Instruction": "Go."}]
    prompts, _ = load_prompts(str(write(tmp_path / "rows.jsonl", rows)))
    assert [(p.id, p.text, p.skill, p.difficulty) for p in prompts] == [
        ("1", "Add.", "Math", 6.0),
        ("2", "Go.", None, None),
    ]


def test_prompts_with_the_same_id_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"row 2, id: 'a' is also row 1's"):
        load_prompts(str(write(tmp_path / "rows.json", [fastchat()[0], fastchat()[0]])))
    with pytest.raises(InputError, match=r"row 1, its prompt: empty"):
        load_prompts(str(write(tmp_path / "empty.json", [{"prompt": " "}])))


def test_references_from_rows_and_from_a_pred_json(tmp_path):
    path = write(tmp_path / "rows.json", stanford())
    assert load_references(str(path)).by_id["b"] == "3\n\nThat is all."
    pred = tmp_path / "pred.json"
    pred.write_text(json.dumps({"q": {"input": [{"role": "user", "content": "Hi"}], "output": ["Hello."]}}))
    assert load_references(str(pred)).by_id == {"q": "Hello."}
    with pytest.raises(InputError, match=r"row 1, its answer"):
        load_references(str(write(tmp_path / "none.json", [{"prompt": "a"}])))


def test_the_test_file_is_refused_as_training_data(tmp_path):
    path = write(tmp_path / "rows.json", fastchat())
    refused(path, "this is the test set", test=str(path))
    copy = tmp_path / "copy.json"
    copy.write_bytes(path.read_bytes())
    refused(path, "this is the test set", test=str(copy))
    prompts, digest = load_prompts(str(path))
    other = load(write(tmp_path / "other.jsonl", stanford()))
    with pytest.raises(InputError, match="this is the test set"):
        refuse_test_as_train(other, prompts, digest)
    unlike = [*ROWS[:1], ("x", "Else?", "", "Yes.", None), ("y", "More?", "", "No.", None)]
    refuse_test_as_train(load(write(tmp_path / "unlike.json", stanford(unlike))), prompts, digest)


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
    saved = write(tmp_path / "saved", fastchat())
    monkeypatch.setitem(sys.modules, "fast_ft.hub.download", types.SimpleNamespace(fetch_dataset=lambda name: saved))
    assert len(load("someone/some-rows")) == 3


def test_the_lead_is_stripped_in_every_form():
    stanfords = (
        "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
    )
    long = f"{stanfords.format(WITH_INPUT)}\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:"
    assert strip_lead(long) == strip_lead(prompt("Add.", "1 and 2")) == "Add.\n1 and 2"
    assert strip_lead(prompt("Go.", "")) == strip_lead("Go.") == "Go."
    assert strip_lead("a ### Input: \n### Input:b\n### Response: ") == "a\n\nb"


def test_a_megabyte_of_spaces_takes_no_longer_than_other_text():
    began = time.process_time()
    assert strip_lead("a" + " " * 1_000_000 + "b") == "a" + " " * 1_000_000 + "b"
    assert time.process_time() - began < 20, "a pattern that begins again at each space takes minutes"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared real data is not here")
def test_the_homeworks_real_sets_load():
    arrow = load(SHARED / "filtered_alpaca_1k_longest")
    fastchat_json = load(SHARED / "filtered_alpaca_1k_longest.json")
    assert arrow.examples(range(1000)) == fastchat_json.examples(range(1000))
    assert len(load(SHARED / "filtered_alpaca_1k_score.json")) == 1000
    assert len(load(SHARED / "random_9k.json")) == 9229
    test = SHARED / "test_set_evol_instruct_150.json"
    prompts, digest = load_prompts(str(test))
    assert len(prompts) == 150
    refuse_test_as_train(arrow, prompts, digest)
    refused(test, "this is the test set", test=str(test))
