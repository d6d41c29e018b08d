"""file_formats.py, json_rows.py, delimited.py, sources.py: what kinds of files are read, and what is said of others."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import random
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fast_ft.common.errors import InputError
from fast_ft.data import delimited, file_formats, sources
from fast_ft.data.dataset import load_pool, load_prompts
from fast_ft.recipe.schema import Columns, Data

CASES = Path(__file__).parents[3] / "shared" / "cases" / "files"
ROWS = [
    {"id": "a", "instruction": "Name a river.", "input": "", "output": 'The Rhine, or the "Rhein".'},
    {"id": "b", "instruction": "Add.", "input": "1;2", "output": "3\n\nThat is all."},
    {"id": "c", "instruction": "你好", "input": "", "output": "Tab\there."},
]
JSON = json.dumps(ROWS).encode()


def load(path, **keys):
    return load_pool(Data(train=str(path), **keys))


def message(path, **keys):
    with pytest.raises(InputError) as caught:
        load(path, **keys)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text, text
    return text


def texts(pool):
    return list(zip(*(pool.table[name].to_pylist() for name in ("id", "prompt", "response")), strict=True))


def as_table(between, end="\n"):
    def cell(text):
        return '"' + text.replace('"', '""') + '"'

    lines = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    return end.join(between.join(map(cell, line)) for line in lines).encode()


def parquet():
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), out)
    return out.getvalue()


KINDS = {
    "csv": as_table(","),
    "csv with crlf": as_table(",", "\r\n"),
    "csv with cr": as_table(",", "\r"),
    "csv with a byte order mark": b"\xef\xbb\xbf" + as_table(","),
    "csv with semicolons": as_table(";"),
    "tsv": as_table("\t"),
    "gzip": gzip.compress(JSON),
    "gzip in two parts": gzip.compress(JSON[:50]) + gzip.compress(JSON[50:]),
    "zstd": pa.compress(JSON, codec="zstd", asbytes=True),
    "csv in gzip": gzip.compress(as_table(",")),
    "parquet in zstd": pa.compress(parquet(), codec="zstd", asbytes=True),
    "parquet": parquet(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["rows", "rows.json", "rows.txt"])
def test_every_kind_gives_the_same_rows_under_any_name(kind, name, tmp_path):
    (tmp_path / "plain.json").write_bytes(JSON)
    (tmp_path / name).write_bytes(KINDS[kind])
    assert texts(load(tmp_path / name)) == texts(load(tmp_path / "plain.json"))


def test_numbers_of_a_table(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,response,score\na,15,4.5\nb,1e3,\n\nc,007,3\n")
    pool = load(tmp_path / "rows.csv")
    assert pool.table["score"].to_pylist() == [4.5, None, 3.0]
    assert pool.table["response"].to_pylist() == ["15", "1e3", "007"], "a cell is text as it stands"
    (tmp_path / "rows.csv").write_text("prompt,response,score\na,b,high\n")
    assert "row 1, score: 'high' is no number" in message(tmp_path / "rows.csv")
    assert delimited.number("nan") != delimited.number("nan"), "it is a number, which the reader of rows refuses"


def test_a_table_of_long_cells(tmp_path):
    long = "word " * 200_000
    (tmp_path / "rows.csv").write_text(f'prompt,response\na,"{long}"\n')
    assert load(tmp_path / "rows.csv").table["response"].to_pylist() == [long.strip()]


TABLES = {
    "too many cells": ("prompt,response\na,b\nc,d,e\n", ["row 2 (line 3): 3 cells", "has 2", "double quotes"]),
    "too few cells": ("prompt,response\na\n", ["row 1 (line 2): 1 cells"]),
    "an open quote": ('prompt,response\na,"b\n', ["not valid CSV", "double its quotes"]),
    "a quote within": ('prompt,response\n"a"b,c\n', ["not valid CSV"]),
    "two columns of one name": ("prompt,response,prompt\na,b,c\n", ["two columns are called 'prompt'"]),
    "unknown columns": ("question,reply\na,b\n", ["unknown layout (keys found: question, reply)"]),
    "no rows": ("prompt,response\n", ["no rows"]),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_bad_table_is_named(case, tmp_path):
    text, words = TABLES[case]
    (tmp_path / "rows.csv").write_text(text)
    said = message(tmp_path / "rows.csv")
    assert all(word in said for word in words), said


def archive(names):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return out.getvalue()


def tar(mode):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as file:
        info = tarfile.TarInfo("rows.json")
        info.size = len(JSON)
        file.addfile(info, io.BytesIO(JSON))
    return out.getvalue()


def database(path):
    with sqlite3.connect(path) as base:
        base.execute("create table rows (prompt text)")
    base.close()
    return path.read_bytes()


OTHERS = {
    "xlsx": (archive(["[Content_Types].xml", "xl/workbook.xml"]), ["Excel workbook (xlsx)", "CSV"]),
    "docx": (archive(["word/document.xml"]), ["Word document"]),
    "zip": (archive(["rows.json"]), ["a zip archive is not read", "Unpack it"]),
    "a broken zip": (b"PK\x03\x04rest", ["a zip archive"]),
    "npz": (archive(["a.npy"]), ["NumPy"]),
    "torch": (archive(["x/data.pkl"]), ["a pickle in it", "run code"]),
    "pickle": (pickle.dumps(ROWS), ["a pickle is not read", "run code"]),
    "pickle in gzip": (gzip.compress(pickle.dumps(ROWS)), ["a pickle packed by gzip", "run code"]),
    "tar in gzip": (tar("w:gz"), ["a tar archive packed by gzip", "Unpack it"]),
    "tar": (tar("w"), ["a tar archive is not read"]),
    "gzip in gzip": (gzip.compress(gzip.compress(JSON)), ["gzip packed by gzip", "Unpack it once"]),
    "bzip2": (bz2.compress(JSON), ["bzip2 is not read"]),
    "xz": (lzma.compress(JSON), ["xz is not read"]),
    "pdf": (b"%PDF-1.7\n", ["a PDF document"]),
    "a web page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", ["a web page (HTML)", "Fetch the file"]),
    "xml": (b"<?xml version='1.0'?><rows/>", ["XML is not read"]),
    "UTF-16": ("[]".encode("utf-16"), ["not UTF-8 text but UTF-16"]),
    "prose": (b"Once upon a time\nthere was a row.\n", ["neither JSON nor a table"]),
    "cut gzip": (gzip.compress(JSON)[:-12], ["gzip, damaged or cut off"]),
    "cut zstd": (pa.compress(JSON, codec="zstd", asbytes=True)[:-9], ["zstd, damaged or cut off"]),
    "nothing in gzip": (gzip.compress(b""), ["gzip with an empty file in it"]),
    "trailing comma": (JSON[:-1] + b",]", ["line 1, column", "a comma before the closing ]. Take"]),
    "trailing comma in a row": (b'{"prompt": "a",}', ["a comma before the closing }"]),
    "carriage returns": (b'{"prompt": "a"}\r{"prompt": "b"}', ["carriage returns alone (CR)", "line feeds"]),
    "Python's quotes": (b"[{'prompt': 'a'}]", ["single quotes"]),
    "Python's None": (b'[{"prompt": None}]', ["null, true and false"]),
    "a comment": (b'[{"prompt": "a"} // one\n]', ["a comment"]),
    "rows on several lines each": (b'{\n"prompt": "a"\n}\n{\n"prompt": "b"\n}', ["one row a line (JSONL)"]),
    "a missing comma": (b'[{"prompt": "a"} {"prompt": "b"}]', ["A comma is missing"]),
    "cut off": (JSON[:-40], ["may be cut off"]),
    "a broken line": (b'{"prompt": "a"}\n{"prompt": \n{"prompt": "b"}', ["line 2", "Mend"]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_that_is_not_read_is_named_for_what_it_is(kind, tmp_path):
    content, words = OTHERS[kind]
    (tmp_path / "rows.json").write_bytes(content)
    said = message(tmp_path / "rows.json")
    assert all(word in said for word in words), said
    assert ("may be cut off" in said) == (kind == "cut off"), "what is whole is not said to be cut off"


def test_a_database_is_named(tmp_path):
    database(tmp_path / "rows.db")
    assert "an SQLite database is not read. Export it as CSV" in message(tmp_path / "rows.db")


def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    (tmp_path / "rows.json").write_bytes(gzip.compress(b" " * 3_000_000))
    monkeypatch.setattr(file_formats, "MOST_UNPACKED", 1_000_000)
    assert "unpacks to over 1,000,000 bytes" in message(tmp_path / "rows.json")


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")
def test_the_shared_files():
    assert len(load(CASES / "x.csv")) == 1
    assert len(load(CASES / "x.json.gz")) > 0
    for name, words in {
        "cr.jsonl": "carriage returns", "trailcomma.json": "a comma before", "x.xlsx": "Excel",
        "x.jsonl.zst": "zstd, damaged or cut off",
    }.items():  # fmt: skip
        assert words in message(CASES / name)


# Splits


def pieces(folder, names, suffix=".jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        row = {"id": name, "prompt": f"Of {name}?", "response": "Yes."}
        (folder / f"{name}{suffix}").write_text(json.dumps(row) + "\n")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_split_is_told_by_its_files_name(tmp_path, suffix):
    pieces(tmp_path / "data", ["train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001"], suffix)
    assert load(tmp_path).table["id"].to_pylist() == ["train-00000-of-00001"]
    assert load(tmp_path, split="validation").table["id"].to_pylist() == ["validation-00000-of-00001"]
    assert load_prompts(str(tmp_path))[0][0].id == "test-00000-of-00001"
    assert "none of the split extra" in message(tmp_path, split="extra")


def test_other_names_and_forms_of_splits(tmp_path):
    pieces(tmp_path / "a", ["rows_train", "rows_dev"])
    assert load(tmp_path / "a").table["id"].to_pylist() == ["rows_train"]
    assert load(tmp_path / "a", split="validation").table["id"].to_pylist() == ["rows_dev"]
    pieces(tmp_path / "b" / "train", ["one"]), pieces(tmp_path / "b" / "valid", ["two"])
    assert load(tmp_path / "b").table["id"].to_pylist() == ["one"]
    assert load(tmp_path / "b", split="validation").table["id"].to_pylist() == ["two"]
    pieces(tmp_path / "c", ["train_sft", "train_gen"])
    assert "several data files" in message(tmp_path / "c")
    assert load(tmp_path / "c", split="train_gen").table["id"].to_pylist() == ["train_gen"]
    both = {"train": [{"prompt": "a", "response": "b"}], "test": [{"prompt": "c"}]}
    (tmp_path / "both.json").write_text(json.dumps(both))
    assert load(tmp_path / "both.json").table["prompt"].to_pylist() == ["a"]
    assert load_prompts(str(tmp_path / "both.json"))[0][0].text == "c", "the test's rows, not the training's"


def test_a_dataset_dict_by_split(tmp_path):
    for name in ("train", "extra"):
        (tmp_path / name).mkdir(parents=True)
        table = pa.table({"prompt": [f"Of {name}?"], "response": ["Yes."]})
        with pa.OSFile(str(tmp_path / name / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
        state = {"_data_files": [{"filename": "data.arrow"}], "_split": name}
        (tmp_path / name / "state.json").write_text(json.dumps(state))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "extra"]}')
    assert load(tmp_path).table["prompt"].to_pylist() == ["Of train?"]
    assert load(tmp_path, split="extra").table["prompt"].to_pylist() == ["Of extra?"]
    assert "it has the splits train, extra, none called dev" in message(tmp_path, split="dev")
    assert "the split extra, where the split train was asked" in message(tmp_path / "extra", split="train")


# A column map


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_a_column_map(tmp_path, suffix):
    rows = [{"question": f"Q{n}", "answer": f"A{n}", "output": "no", "rating": f"{n}.5"} for n in range(3)]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{**row, "rating": float(row["rating"])} for row in rows]), path)
    elif suffix == ".csv":
        path.write_text("\n".join(",".join(line) for line in [list(rows[0]), *(row.values() for row in rows)]))
    else:
        path.write_text(json.dumps([{**row, "rating": float(row["rating"])} for row in rows]))
    columns = Columns(prompt="question", response="answer", score="rating")
    pool = load(path, columns=columns)
    assert pool.table["prompt"].to_pylist() == ["Q0", "Q1", "Q2"]
    assert pool.table["response"].to_pylist() == ["A0", "A1", "A2"]
    assert pool.table["score"].to_pylist() == [0.5, 1.5, 2.5]
    assert load_prompts(str(path), columns)[0][1].text == "Q1"
    said = message(path, columns=Columns(prompt="question", response="anser"))
    assert "data.columns.response: no row has the key 'anser' (did you mean 'answer'?)" in said


def test_a_column_map_leaves_other_layouts_alone(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "grade": 3}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pool = load(tmp_path / "rows.json", columns=Columns(score="grade"))
    assert (pool.table["prompt"].to_pylist(), pool.table["score"].to_pylist()) == (["a"], [3.0])
    assert load_prompts(str(tmp_path / "rows.json"), Columns(prompt="question"))[0][0].text == "a"
    renamed = [{"dialog": rows[0]["conversations"], "conversations": "an old form"}]
    (tmp_path / "rows.json").write_text(json.dumps(renamed))
    assert load(tmp_path / "rows.json", columns=Columns(messages="dialog")).table["response"].to_pylist() == ["b"]


def test_shuffled_bytes_are_a_message(tmp_path):
    draw = random.Random(11)
    for kind in KINDS.values():
        broken = bytearray(kind)
        for _ in range(6):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        (tmp_path / "rows").write_bytes(broken)
        try:
            load(tmp_path / "rows")
        except InputError as error:
            assert str(tmp_path / "rows") in str(error)


def test_a_split_that_is_asked_for_has_to_be_there(tmp_path):
    rows = [{"id": f"{n}", "prompt": f"{n}?", "response": f"{n}."} for n in range(4)]
    held = tmp_path / "held.json"
    held.write_text(json.dumps({"training": rows[:2], "test": rows[2:]}))
    assert load(held).table["id"].to_pylist() == ["0", "1"]
    assert load(held, split="test").table["id"].to_pylist() == ["2", "3"]
    for split in ("dev", "validation"):
        said = message(held, split=split)
        assert f"it has the splits training, test, none called {split}" in said
    with pytest.raises(InputError, match="it has the splits training, test, none called validation"):
        sources.read(str(held), "validation")  # rows of another split would be taken for validation rows
    plain = tmp_path / "rows.jsonl"
    plain.write_text("\n".join(map(json.dumps, rows)))
    assert "it holds no split test, which was asked for. Leave split out." in message(plain, split="test")
    plain.rename(tmp_path / "rows-test.jsonl")
    assert len(load(tmp_path / "rows-test.jsonl", split="test")) == 4


def test_a_key_that_stands_twice_is_refused(tmp_path):
    row = '{"prompt": "a?", "response": "first", "response": "second"}'
    good = '{"prompt": "b?", "response": "b."}'
    lines, listed = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text(f"{good}\n{row}\n")
    listed.write_text(f"[{good},\n{row}]")
    twice = "the key 'response' stands more than once in one object, as 'first' and 'second'"
    assert f"rows.jsonl, line 2: not usable JSON: {twice}" in message(lines)
    assert f"rows.json: not usable JSON: {twice}" in message(listed)
