"""Training rows, prompts and references from files. Any layout gives the same Examples; errors name file, row, field.

Reading bytes is in data/sources.py, and what a row means is in data/formats.py. Nothing here imports torch or
datasets: 52,002 rows are loaded in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fast_ft.common.errors import InputError
from fast_ft.common.folders import expanded
from fast_ft.data import regular_rows, sources
from fast_ft.data.examples import Pool, Prompt
from fast_ft.data.formats import RawRow, fail, is_number, parse_row, strip_lead, strip_leads
from fast_ft.data.references import Question, References, question
from fast_ft.recipe.schema import Data


def load_pool(section: Data) -> Pool:
    """Load the training rows of a recipe's `data` section. Raises InputError.

    A row without an id gets "row-<n>", its number counted from 1, in every layout.
    """
    source = sources.read(section.train)
    if section.test is not None and _same_files(section.test, source.digest):
        _refuse(source.name, section.test)
    table = None
    if isinstance(source.rows, pa.Table):
        table = regular_rows.regular_table(source.rows, source.name)
    if table is None:
        rows = _parse(source)
        table = pa.table(
            {
                "id": _strings([row.id or f"row-{n}" for n, row in enumerate(rows, 1)], source.name, "id"),
                **_exchanges(rows, source.name, section.multi_turn),
                "score": pa.array([_score(row, source.name, n) for n, row in enumerate(rows, 1)], pa.float64()),
            }
        )
    _refuse_duplicate_ids(table["id"], source.name)
    if pc.all(pc.equal(table["response"], "")).as_py():
        raise InputError(f"{source.name}: every response is empty. Give rows with answers to learn from.")
    return Pool(table, source.name, source.digest)


def load_prompts(path: str) -> tuple[list[Prompt], str]:
    """Return the prompts of a file in any layout, in file order, and the file's digest. A last answer is left out.

    Raises InputError.
    """
    source = sources.read(path, "test")
    prompts = []
    for number, row in enumerate(_parse(source), 1):
        turns = row.turns[:-1] if row.turns and row.turns[-1][0] == "assistant" else row.turns
        if not turns or not all(text for _, text in turns):
            fail(path, number, "its prompt", "empty or missing", "Give the user's text, or leave the row out.")
        messages = _messages(row, turns)
        prompts.append(Prompt(row.id or f"row-{number}", tuple(messages), row.skill, row.difficulty))
    _strings([message["content"] for prompt in prompts for message in prompt.messages], path, "prompt")
    _refuse_duplicate_ids(_strings([prompt.id for prompt in prompts], path, "id"), path)
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
        if not row.turns or row.turns[-1][0] != "assistant" or not row.turns[-1][1]:
            fail(path, number, "its answer", "empty or missing", "A reference has an answer: add it.")
        id_ = row.id or f"row-{number}"
        if id_ in answers:
            fail(path, number, "id", f"{id_!r} stands in an earlier row too", "Ids are unique: mend the file.")
        answers[id_] = row.turns[-1][1]
        questions[id_] = question(_messages(row, row.turns[:-1]))
    _strings([*answers, *answers.values()], path, "its answer")
    return References(answers, questions, path)


def _messages(row: RawRow, turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Return a prompt's turns as messages, a system text in front of the first."""
    if not turns:
        return []
    first = {"role": "user", "content": _join(row.system, turns[0][1])}
    return [first] + [{"role": role, "content": text} for role, text in turns[1:]]


def refuse_test_as_train(pool: Pool, prompts: Iterable[Prompt], prompts_digest: str, test: str = "data.test") -> None:
    """Raise InputError if the training file is the test file: the same bytes, or mostly the test's prompts.

    A few prompts in common are no error; contamination.certificate reports them.
    """
    texts = pa.array(sorted({strip_lead(prompt.text) for prompt in prompts}), pa.string())
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
            rows = rows.to_pylist()
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise InputError(f"{source.name}: not valid Arrow data: {error}. Write the file again.") from error
    return [parse_row(row, source.name, number) for number, row in enumerate(rows, 1)]


def _exchanges(rows: list[RawRow], name: str, multi_turn: str) -> dict[str, pa.Array]:
    """Return the prompt and response columns: each row's one exchange, its first or its last."""
    prompts, responses = [], []
    for number, row in enumerate(rows, 1):
        turns = row.turns
        if len(turns) > 2 and multi_turn == "error":
            fail(name, number, "its turns", f"{len(turns)} turns, where a row is one prompt and one response",
                 "Set data.multi_turn to first or last, or split the row.")  # fmt: skip
        turns = turns[-2:] if multi_turn == "last" else turns[:2]
        if len(turns) < 2 or turns[-1][0] != "assistant":
            fail(name, number, "its response", "missing", "Training rows have an answer (a test set has none): add it.")
        if not turns[0][1]:
            fail(name, number, "its prompt", "empty", "Give the user's text, or leave the row out.")
        prompts.append(_join(row.system, turns[0][1]))
        responses.append(turns[1][1])
    return {"prompt": _strings(prompts, name, "its prompt"), "response": _strings(responses, name, "its response")}


def _join(system: str, prompt: str) -> str:
    return f"{system}\n\n{prompt}" if system else prompt


def _score(row: RawRow, name: str, number: int) -> float | None:
    if row.score is None:
        return None
    if not is_number(row.score):
        fail(name, number, "score", f"{row.score!r} is no number", "Give a finite number, or null for none.")
    return float(row.score)


def _strings(texts: list[str], name: str, field: str) -> pa.Array:
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:
        bad = next(n for n, text in enumerate(texts, 1) if any("\ud800" <= char <= "\udfff" for char in text))
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
