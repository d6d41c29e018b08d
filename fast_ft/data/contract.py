"""What a tokenised row keeps to, checked against the text it came from and not only against the code that made it.

The control tokens are the form's own and no others; each trained turn has the prompt before it that generation will
give, is trained from its first token to the token that ends it, and spells its text; nothing is cut.
"""

from __future__ import annotations

import json
from collections import Counter

from fast_ft.common.text_safety import character_name
from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow, Encoder
from fast_ft.data.examples import Example


def contract_problems(row: EncodedRow, example: Example, encoder: Encoder, max_length: int) -> list[str]:
    """Say how a row breaks the contract, in plain words; [] when it holds."""
    ids, labels, problems = row.input_ids, row.labels, []
    if len(ids) != len(labels):
        return [f"{len(ids)} ids but {len(labels)} labels"]
    if any(label not in (IGNORE_INDEX, id_) for id_, label in zip(ids, labels, strict=True)):
        problems.append("a label is not the id at its own place")
    made = encoder.conversation(example)
    if (found := encoder.control_ids(ids)) != made.controls:
        begins, due = found.count(encoder.bos_id or -1), made.controls.count(encoder.bos_id or -1)
        what = (
            f"{begins} BOS tokens, where {due} are due" if begins != due else "other control tokens than its form has"
        )
        problems.append(what)
    turns = [index for index, message in enumerate(example.messages) if message.trained]
    parts = trained_parts(row)
    if len(parts) != len(turns):
        return [*problems, f"{len(parts)} trained parts, where {len(turns)} turns are trained"]
    prompted = [number for number, differs in enumerate(made.context_differs) if not differs]
    for number in {*prompted[:1], *prompted[-1:]}:  # the last one's prompt holds those of all before it
        asked = [message.turn for message in example.messages[: turns[number]]]
        if ids[: parts[number][0]] != encoder.prompt_ids(asked, example.tools):
            problems.append("the masked tokens are not the prompt that generation will give")
    for (start, end), index, text in zip(parts, turns, made.texts, strict=True):
        if ids[end - 1] not in encoder.end_ids:
            problems.append("the token that ends the response is not trained on")
        if encoder.decode(ids[start:end]) != text or not _spells(text, example.messages[index].content):
            problems.append("the trained tokens do not spell the response")
    whole = encoder.decode(ids)
    if not all(_spells(whole, message.content) for message in example.messages if not message.trained):
        problems.append("the masked tokens do not spell the prompt")
    if len(ids) > max_length:
        problems.append(f"{len(ids)} tokens, over model.max_length {max_length}")
    return problems


def trained_parts(row: EncodedRow) -> list[tuple[int, int]]:
    """Return (start, end) of each stretch of trained tokens."""
    on = [label != IGNORE_INDEX for label in row.labels]
    starts = [i for i, each in enumerate(on) if each and not (i and on[i - 1])]
    ends = [i + 1 for i, each in enumerate(on) if each and not (i + 1 < len(on) and on[i + 1])]
    return list(zip(starts, ends, strict=True))


def lost_character(text: str, encoder: Encoder) -> str | None:
    """Return the name of a character that the tokenizer cannot give back, or None where it gives back all."""
    back = encoder.decode(encoder.tokenizer.encode([text])[0])
    if back == text.strip():
        return None
    lacking = Counter(text) - Counter(back)
    return character_name(max(lacking or text))


def _spells(text: str, content: str) -> bool:
    """Return whether a text holds a turn's, as it is or as a chat template's `tojson` writes it."""
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text
