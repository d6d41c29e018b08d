"""Training rows, prompts and references from files. Any layout gives the same Examples; errors name file, row, field.

Reading bytes is in data/sources.py, and what a row means is in data/formats.py. Nothing here imports torch or
datasets: 52,002 rows are loaded in a fraction of a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fast_ft.common.errors import InputError
from fast_ft.common.folders import expanded
from fast_ft.common.wording import counted
from fast_ft.data import regular_rows, sources
from fast_ft.data.examples import Example, Pool, Prompt, packed
from fast_ft.data.formats import RawRow, is_number, parse_row, strip_lead, strip_leads
from fast_ft.data.references import Question, References, question
from fast_ft.data.turns import fail
from fast_ft.recipe.schema import Columns, Data


def load_pool(section: Data, default: str = "train") -> Pool:
    """Load the rows that data.train of a recipe's `data` section names. Raises InputError.

    default: the split that is read where there are several and the section names none. A row without an id gets
    "row-<n>", its number counted from 1, in every layout.
    """
    assert isinstance(section.train, str), "data/mixing.py loads several sources one by one"
    source = sources.read(section.train, default, split=section.split, columns=section.columns.given)
    if section.test is not None and _same_files(section.test, source.digest):
        _refuse(source.name, section.test)
    table, unused = _table(source, section.train_on)
    _refuse_duplicate_ids(table["id"], source.name)
    if pc.all(pc.equal(table["response"], "")).as_py():
        raise InputError(f"{source.name}: every response is empty. Give rows with answers to learn from.")
    return Pool(table, source.name, source.digest, tuple(_unused_notes(unused, source.name)))


def load_prompts(
    path: str, columns: Columns | None = None, *, notes: list[str] | None = None
) -> tuple[list[Prompt], str]:
    """Return the prompts of a file in any layout, in file order, and the file's digest. A last answer is left out.

    columns: the training rows' own names of keys, which count here where the rows have them. `notes` gets a sentence
    for each field that holds text and is not used. Raises InputError.
    """
    source = sources.read(path, "test", columns=columns.given if columns else None, loosely=True)
    prompts = []
    rows = _parse(source)
    for number, row in enumerate(rows, 1):
        messages = row.messages[:-1] if row.messages and row.messages[-1].role == "assistant" else row.messages
        if not messages or not all(each.text for each in messages):
            fail(path, number, "its prompt", "empty or missing", "Give the user's text, or leave the row out.")
        if messages[-1].role not in ("user", "tool"):
            fail(path, number, "its last turn", f"a {messages[-1].role} turn", "A prompt ends with the user's text.")
        id_ = row.id or f"row-{number}"
        prompts.append(Prompt(id_, tuple(each.turn for each in messages), row.skill, row.difficulty, row.tools))
    _strings([prompt.all_text for prompt in prompts], path, "prompt")
    _refuse_duplicate_ids(_strings([prompt.id for prompt in prompts], path, "id"), path)
    if notes is not None:
        notes += _unused_notes(Counter(field for row in rows for field in row.unused), path)
    return prompts, source.digest


def load_references(path: str) -> References:
    """Return reference answers for judging: each row's last answer, in any layout, or a pred.json's first.

    Raises InputError.
    """
    source = sources.read(path, "test")
    rows = source.rows
    if isinstance(rows, list) and len(rows) == 1 and isinstance(rows[0], dict) and _is_pred(rows[0]):
        texts = {id_: entry["output"][0].strip() for id_, entry in rows[0].items()}
        _strings([*texts, *texts.values()], path, "its answer")
        return References(texts, {id_: question(entry.get("input")) for id_, entry in rows[0].items()}, path)
    answers: dict[str, str] = {}
    questions: dict[str, Question | None] = {}
    for number, row in enumerate(_parse(source), 1):
        if not row.messages or row.messages[-1].role != "assistant" or not row.messages[-1].content:
            fail(path, number, "its answer", "empty or missing", "A reference has an answer: add it.")
        id_ = row.id or f"row-{number}"
        if id_ in answers:
            fail(path, number, "id", f"{id_!r} stands in an earlier row too", "Ids are unique: mend the file.")
        answers[id_] = row.messages[-1].content
        questions[id_] = question([each.turn for each in row.messages[:-1]])
    _strings([*answers, *answers.values()], path, "its answer")
    return References(answers, questions, path)


def refuse_test_as_train(pool: Pool, prompts: Iterable[Prompt], prompts_digest: str, test: str = "data.test") -> None:
    """Raise InputError if the training file is the test file: the same bytes, or mostly the test's prompts.

    A few prompts in common are no error; contamination.certificate reports them.
    """
    texts = pa.array(sorted({strip_lead(text) for p in prompts for text in (p.text, p.all_text)}), pa.string())
    shared = pc.sum(pc.is_in(strip_leads(pool.table["prompt"]), value_set=texts)).as_py() or 0
    if pool.digest == prompts_digest or 2 * shared > len(pool):
        _refuse(pool.source, test)


def _refuse(train: str, test: str) -> None:
    raise InputError(
        f"{train}: this is the test set ({test}). Training on it would make every score void: "
        "give data.train other rows."
    )


def _same_files(test: str, digest: str) -> bool:
    """Return whether the test set's files have this digest; load_prompts reports a test set that cannot be found."""
    path = expanded(test)
    try:
        return path.exists() and sources.digest(sources.data_files(path, "test")) == digest
    except (InputError, OSError):
        return False


def _parse(source: sources.Source) -> list[RawRow]:
    rows = source.rows
    if isinstance(rows, pa.Table):
        try:
            rows.validate(full=True)  # finds text that is not UTF-8
            rows = [_without_nulls(row) for row in rows.to_pylist()]
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise InputError(f"{source.name}: not valid Arrow data: {error}. Write the file again.") from error
    return [parse_row(row, source.name, number) for number, row in enumerate(rows, 1)]


def _without_nulls(value: Any) -> Any:
    """Return a value of Arrow's without the keys that it filled with null because other rows have them."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _table(source: sources.Source, train_on: str) -> tuple[pa.Table, Mapping[str, int]]:
    """Return a source's rows as Pool.table's columns, and in how many rows each field holds text that is not used."""
    if isinstance(source.rows, pa.Table):
        table = regular_rows.regular_table(source.rows, source.name)
        if table is not None:
            return table, regular_rows.unused_texts(source.rows)
    rows = _parse(source)
    examples = [_example(row, source.name, number, train_on) for number, row in enumerate(rows, 1)]
    columns = {
        "id": _strings([each.id for each in examples], source.name, "id"),
        "messages": _strings([packed(each) for each in examples], source.name, "its turns"),
        "prompt": _strings([each.prompt for each in examples], source.name, "its prompt"),
        "response": _strings([each.response for each in examples], source.name, "its response"),
        "score": pa.array([each.score for each in examples], pa.float64()),
    }
    return pa.table(columns), Counter(field for row in rows for field in row.unused)


def _example(row: RawRow, name: str, number: int, train_on: str) -> Example:
    """Return a training row. Raises InputError where it has no prompt, no answer, or no turn with a loss."""
    messages = row.messages
    if not messages or messages[-1].role != "assistant":
        fail(name, number, "its response", "missing", "Training rows have an answer (a test set has none): add it.")
    if not all(each.content for each in messages if each.role == "user"):
        fail(name, number, "its prompt", "empty", "Give the user's text, or leave the row out.")
    if train_on == "last":
        messages = [replace(each, trained=False) for each in messages[:-1]] + messages[-1:]
    trained = [each for each in messages if each.trained]
    if not trained:
        fail(
            name, number, "its loss", "no answer is trained (weight 0, or train or training false)",
            "Train one of its answers, or leave the row out.",
        )  # fmt: skip
    if len(trained) > 1 and not all(each.text for each in trained):
        position = next(i for i, each in enumerate(messages) if each.trained and not each.text)
        fail(name, number, f"its turn {position + 1}", "an empty answer", "Give its text, or set train: false on it.")
    return Example(row.id or f"row-{number}", tuple(messages), _score(row, name, number), row.tools)


def _unused_notes(counts: Mapping[str, int], name: str) -> list[str]:
    """Return a sentence for each field that holds text of which nothing is used."""
    return [
        f"{name}: what the field {field!r} holds is not used ({counted(count, 'row')})."
        for field, count in sorted(counts.items())
    ]


def _score(row: RawRow, name: str, number: int) -> float | None:
    if row.score is None:
        return None
    if not is_number(row.score):
        fail(name, number, "score", f"{row.score!r} is no number", "Give a finite number, or null for none.")
    return float(row.score)


def _strings(texts: Sequence[str | None], name: str, field: str) -> pa.Array:
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:
        bad = next(n for n, text in enumerate(texts, 1) if any("\ud800" <= char <= "\udfff" for char in text or ""))
        fail(name, bad, field, "half of a surrogate pair (such as \\ud800)", "Write the character whole.")


def _refuse_duplicate_ids(ids: pa.ChunkedArray | pa.Array, name: str) -> None:
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    seen: dict[str, int] = {}
    for number, id_ in enumerate(ids.to_pylist(), 1):
        if id_ in seen:
            fail(name, number, "id", f"{id_!r} is also row {seen[id_]}'s", "Ids are unique: rename or remove one row.")
        seen[id_] = number


def _is_pred(content: dict[str, Any]) -> bool:
    entries = list(content.values())
    outputs = [entry.get("output") if isinstance(entry, dict) else None for entry in entries]
    return bool(outputs) and all(isinstance(each, list) and each and isinstance(each[0], str) for each in outputs)
