"""What a row means: every layout becomes turns of user and assistant, an id and a score. A new layout is added here.

| layout | keys |
|---|---|
| FastChat, ShareGPT | `conversations` (or `messages`) of `from` (human, gpt) and `value` |
| chat | `messages` (or `conversations`) of `role` (user, assistant) and `content` |
| Stanford Alpaca | `instruction`, `input`, `output`; the prompt gets Alpaca's lead, as the homework has it |
| WizardLM's test | `idx`, `Skill`, `Difficulty`, `Instruction`; the prompt as written |
| plain, TRL | `prompt`, and `response` or `completion` |

Outer whitespace of prompts and responses goes. A system turn is joined to the prompt, a blank line between: training
and generation then see the same text, and Llama 2's own template puts it into the first user turn as well.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

import pyarrow as pa
import pyarrow.compute as pc

from fast_ft.common.errors import InputError

CONVERSATIONS = ("conversations", "messages")
TURN_KEYS = (("role", "content"), ("from", "value"))
ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip
ID_KEYS = ("id", "idx")
#: Layouts of one prompt and one response: the prompt's key, and the keys that the response may have.
PAIRS = {"instruction": ("output",), "Instruction": ("Response", "output"), "prompt": ("response", "completion")}
LAYOUTS = (
    "conversations or messages of from/value or role/content; instruction, input, output; "
    "prompt and response; or WizardLM's idx, Skill, Difficulty, Instruction"
)
LEAD = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request. "
    "### Instruction: "
)
LEAD_WITH_INPUT = ", paired with an input that provides further context"
#: Matches the lead in the homework's form (spaces) and in Stanford's own (line breaks). For re and for Arrow's RE2.
LEAD_PATTERN = (
    rf"^Below is an instruction that describes a task({LEAD_WITH_INPUT})?\. "
    r"Write a response that appropriately completes the request\.\s*(### Instruction:)?\s*"
)
INPUT_HEADING, RESPONSE_HEADING = "### Input:", "### Response:"
#: For Arrow's RE2, which takes no longer for any text.
INPUT_PATTERN, RESPONSE_PATTERN = rf"\s*{INPUT_HEADING}\s*", rf"\s*{RESPONSE_HEADING}\s*$"


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of any layout. `turns`: (role, text), user and assistant alternating; system: the system turns' text."""

    id: str | None
    turns: list[tuple[str, str]]
    system: str
    score: Any
    skill: str | None = None
    difficulty: float | None = None


def fail(name: str, number: int, field: str, problem: str, remedy: str) -> NoReturn:
    """Raise the InputError for a field of row `number` (from 1)."""
    raise InputError(f"{name}, row {number}, {field}: {problem}. {remedy}")


def alpaca_prompt(instruction: str, input_: str) -> str:
    """Return Alpaca's lead sentence, instruction and input on one line, as the homework's data set has them."""
    return LEAD.format(LEAD_WITH_INPUT if input_ else "") + instruction + (f" ### Input: {input_}" if input_ else "")


def strip_lead(prompt: str) -> str:
    """Return a prompt's instruction and input, without Alpaca's lead sentence and headings."""
    # By str's own methods: re's `\s*###` takes minutes over a megabyte of spaces: it starts again at each.
    first, *inputs = re.sub(LEAD_PATTERN, "", prompt).split(INPUT_HEADING)
    text = "\n".join([first.rstrip(), *(part.strip() for part in inputs)]) if inputs else first
    return text.strip().removesuffix(RESPONSE_HEADING).strip()


def strip_leads(prompts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return strip_lead() of every prompt, by Arrow's compute."""
    for pattern, instead in ((LEAD_PATTERN, ""), (INPUT_PATTERN, "\n"), (RESPONSE_PATTERN, "")):
        prompts = pc.replace_substring_regex(prompts, pattern=pattern, replacement=instead)
    return pc.utf8_trim_whitespace(prompts)


def parse_row(row: object, name: str, number: int) -> RawRow:
    """Read one row, a JSON object of any known layout. Raises InputError naming file, row and field."""
    if not isinstance(row, dict):
        fail(name, number, "the row", f"not an object ({type(row).__name__})", f"Known layouts: {LAYOUTS}.")
    row = {key: value for key, value in row.items() if value is not None}  # Arrow fills absent keys with None
    id_ = _id(row, name, number)
    score = row.get("score")
    skill, difficulty = row.get("Skill", row.get("skill")), row.get("Difficulty", row.get("difficulty"))
    kind = (None if skill is None else str(skill), float(difficulty) if is_number(difficulty) else None)
    for key in CONVERSATIONS:
        if key in row:
            turns, system = _conversation(row[key], name, number, key)
            return RawRow(id_, turns, system, score, *kind)
    for key, response_keys in PAIRS.items():
        if key in row:
            prompt = _text(row[key], name, number, key)
            if key == "instruction":
                _text(row.get("input", ""), name, number, "input")
                prompt = alpaca_prompt(row[key], row.get("input", "")).strip() if prompt else ""
            return RawRow(id_, _pair(row, prompt, response_keys, name, number), "", score, *kind)
    found = ", ".join(map(str, list(row)[:8])) or "none"
    fail(name, number, "its keys", f"unknown layout (keys found: {found})", f"Known layouts: {LAYOUTS}.")


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def _id(row: dict[str, Any], name: str, number: int) -> str | None:
    key = next((key for key in ID_KEYS if key in row), None)
    if key is None:
        return None
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        fail(name, number, key, f"{value!r} is no id", "Give text or a whole number, or leave the key out everywhere.")
    return str(value)


def _text(value: Any, name: str, number: int, field: str) -> str:
    if not isinstance(value, str):
        fail(name, number, field, f"{str(value)[:40]!r} is not text ({type(value).__name__})", "Give a string.")
    return value.strip()


def _pair(row: dict[str, Any], prompt: str, keys: tuple[str, ...], name: str, number: int) -> list[tuple[str, str]]:
    turns = [("user", prompt)]
    key = next((key for key in keys if key in row), None)
    if key is not None:
        turns.append(("assistant", _text(row[key], name, number, key)))
    return turns


def _conversation(value: Any, name: str, number: int, key: str) -> tuple[list[tuple[str, str]], str]:
    """Return the turns, which must alternate from user on, and the system's text ("" without)."""
    if not isinstance(value, list) or not value:
        fail(name, number, key, f"{str(value)[:40]!r} is no list of turns", "Give [{role, content}, ...].")
    turns: list[tuple[str, str]] = []
    system: list[str] = []
    for position, turn in enumerate(value):
        field = f"{key}[{position}]"
        found = [pair for pair in TURN_KEYS if isinstance(turn, dict) and turn.get(pair[0]) is not None]
        if not found:
            fail(
                name, number, field, f"{str(turn)[:40]!r} is no turn", "A turn has role and content, or from and value."
            )
        said_by, content = found[0]
        role = ROLES.get(str(turn[said_by]).lower())
        if role is None:
            allowed = ", ".join(ROLES)
            fail(name, number, f"{field}.{said_by}", f"unknown role {turn[said_by]!r}", f"Known roles: {allowed}.")
        if turn.get(content) is None:
            fail(name, number, f"{field}.{content}", "missing: the turn has no text", "Give it, or leave the row out.")
        text = _text(turn[content], name, number, f"{field}.{content}")
        if role == "system":
            system += [text] if text else []
        elif role != ("user", "assistant")[len(turns) % 2]:
            fail(name, number, f"{field}.{said_by}", f"{role} out of turn", "Turns go user, assistant, user, ...")
        else:
            turns.append((role, text))
    return turns, "\n\n".join(system)
