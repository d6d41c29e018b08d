"""What a row means: every layout becomes messages, an id and a score. A new layout is added here.

| layout | keys |
|---|---|
| FastChat, ShareGPT | `conversations` (or `messages`) of `from` (human, gpt) and `value` |
| chat | `messages` (or `conversations`) of `role` (user, assistant) and `content` |
| Stanford Alpaca | `instruction`, `input`, `output`; the prompt gets Alpaca's lead, as the homework has it |
| Dolly | `instruction`, `context`, `response`: as Alpaca's |
| WizardLM's test | `idx`, `Skill`, `Difficulty`, `Instruction`; the prompt as written |
| plain, TRL | `prompt`, and `response` or `completion`: texts, or lists of turns |

Beside any of them: `system` or `system_prompt` (a system turn in front) and `tools`; beside the layouts of one question
and one answer: `input` or `context` (a part of the prompt) and `history` (pairs of turns before it), as LLaMA-Factory
and Axolotl have them. Outer whitespace of texts goes. The turns of a conversation are read by data/turns.py.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, TypeGuard

import pyarrow as pa
import pyarrow.compute as pc

from fast_ft.common.untrusted_files import MOST_LEVELS
from fast_ft.data import turns
from fast_ft.data.examples import BLANK_LINE, Message
from fast_ft.data.fields import Fields
from fast_ft.data.turns import CONVERSATIONS, holds_text

ID_KEYS = ("id", "idx")
SYSTEM_KEYS = ("system", "system_prompt")
CONTEXT_KEYS = ("input", "context")
#: Layouts of one prompt and one response: the prompt's key, and the keys that the response may have.
PAIRS = {
    "instruction": ("output", "response", "completion"),
    "Instruction": ("Response", "output"),
    "prompt": ("response", "completion", "output"),
}
#: Fields whose meaning is known and cannot be kept: pictures and sound everywhere, the others beside a conversation.
MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")
PAIR_ONLY_KEYS = ("history", "context")
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
    """One row of any layout. `unused`: the fields that hold text of which nothing is read."""

    id: str | None
    messages: list[Message]
    score: Any
    skill: str | None = None
    difficulty: float | None = None
    tools: tuple[Any, ...] = ()
    unused: frozenset[str] = frozenset()


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
        turns.fail(name, number, "the row", f"not an object ({type(row).__name__})", f"Known layouts: {LAYOUTS}.")
    if _is_too_deep(row):
        turns.fail(
            name, number, "the row", f"lists and objects within one another, over {MOST_LEVELS} levels", "Cut it."
        )
    fields = Fields(row, name, number)
    id_ = _id(fields)
    skill, difficulty = (fields.get(key.title(), fields.get(key)) for key in ("skill", "difficulty"))
    for key in MEDIA_KEYS:
        if fields.get(key):
            fields.fail(key, "only text is trained", "Take the field out, or leave the row out.")
    kind = fields.first((*CONVERSATIONS, *PAIRS))
    if kind is None:
        found = ", ".join(map(str, list(fields.row)[:8])) or "none"
        remedy = f"Known layouts: {LAYOUTS}. For rows with other names, write data.columns, as docs/data.md shows."
        fields.fail("its keys", f"unknown layout (keys found: {found})", remedy)
    if kind in CONVERSATIONS:
        for each in PAIR_ONLY_KEYS:
            if holds_text(fields.row.get(each)):
                fields.fail(each, f"its place in {kind} is not known", f"Write it as turns of {kind}, or take it out.")
    messages = fields.conversation(kind) if kind in CONVERSATIONS else _pair(fields, kind)
    return RawRow(
        id_,
        _with_system(fields, messages),
        fields.get("score"),
        None if skill is None else str(skill),
        float(difficulty) if is_number(difficulty) else None,
        _tools(fields),
        fields.unused(),
    )


def _is_too_deep(row: dict[str, Any]) -> bool:
    """Return whether a row has more levels of lists and objects than any row needs; what reads it calls itself."""
    level: list[Any] = [row]
    for _ in range(MOST_LEVELS):
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            return False
    return True


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def _id(fields: Fields) -> str | None:
    key = fields.first(ID_KEYS)
    if key is None:
        return None
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        fields.fail(key, f"{value!r} is no id", "Give text or a whole number, or leave the key out everywhere.")
    return str(value)


def _pair(fields: Fields, key: str) -> list[Message]:
    """Return the turns of a row of one question and, where there is one, its answer."""
    response = fields.first(PAIRS[key])
    if key == "prompt" and isinstance(fields.row[key], list):
        return _turn_lists(fields, response)
    prompt = fields.text(key)
    filled = [(each, text) for each in CONTEXT_KEYS if (text := fields.text(each))]
    if len(filled) > 1:
        fields.fail(" and ".join(CONTEXT_KEYS), "both hold text", "Join them in one field.")
    context = filled[0][1] if filled else ""
    if key == "instruction":
        prompt = alpaca_prompt(fields.row[key], fields.row[filled[0][0]] if filled else "").strip() if prompt else ""
    elif context:
        prompt = f"{prompt}{BLANK_LINE}{context}".strip()
    messages = [*_history(fields), Message("user", prompt)]
    if response is not None:
        messages.append(Message("assistant", fields.text(response), trained=True))
    return messages


def _turn_lists(fields: Fields, response: str | None) -> list[Message]:
    """Return TRL's lists of turns, one for the prompt and one for the completion; only the latter is trained."""
    asked = fields.get("prompt")
    answered = fields.get(response, []) if response else []
    if not isinstance(answered, list):
        fields.fail(str(response), "text, where prompt is a list of turns", "Give a list of turns in both.")
    messages, unused = turns.conversation(
        asked + answered, fields.name, fields.number, f"prompt + {response}" if response else "prompt"
    )
    if unused:
        fields.fail("prompt", f"fields that are not known: {', '.join(sorted(unused))}", "Take them out.")
    given = len(turns.conversation(asked, fields.name, fields.number, "prompt")[0])
    return [Message(m.role, m.content, m.trained and i >= given, m.more) for i, m in enumerate(messages)]


def _history(fields: Fields) -> list[Message]:
    """Return LLaMA-Factory's `history`, a list of [question, answer], as trained turns."""
    pairs = fields.get("history", [])
    if pairs == "":
        return []
    remedy = "Give a list of [question, answer]."
    if not isinstance(pairs, list):
        fields.fail("history", f"{str(pairs)[:40]!r} is no list", remedy)
    messages: list[Message] = []
    for position, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            fields.fail(f"history[{position}]", f"{str(pair)[:40]!r} is no pair", remedy)
        asked, answered = (
            turns.text_of(text, fields.name, fields.number, f"history[{position}][{place}]")
            for place, text in enumerate(pair)
        )
        messages += [Message("user", asked), Message("assistant", answered, trained=True)]
    return messages


def _with_system(fields: Fields, messages: list[Message]) -> list[Message]:
    """Return the messages with the system text of the row's own field in front."""
    texts = {key: text for key in SYSTEM_KEYS if (text := fields.text(key))}
    if messages and messages[0].role == "system":
        texts["the first turn"] = messages[0].content
    if len({*texts.values()}) > 1:
        fields.fail(" and ".join(texts), "two system texts that differ", "Keep one of them.")
    if not texts or "the first turn" in texts:
        return messages
    return [Message("system", next(iter(texts.values()))), *messages]


def _tools(fields: Fields) -> tuple[Any, ...]:
    """Return the functions that a row offers: a list of objects, or the JSON of one."""
    value = fields.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            fields.fail("tools", "no JSON", "Give a list of functions, or its JSON.")
    if not value or value == "":
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        fields.fail("tools", f"{str(value)[:40]!r} is no list of functions", "Give a list of objects, or its JSON.")
    return tuple(value)
