"""The pocket instruction data: 2,000 rows of mixed quality, 100 test prompts and 300 fresh ones with references.

`python -m tools.pocket` writes the files again, byte for byte. Facts are split by key, so whatever a test or fresh
prompt asks, no training row asks or answers it, in whatever words. Each training row has a hidden quality, known to
`train_rows` alone; its score is that quality seen through a judge's noise, in half steps from 1 to 5.
"""

from __future__ import annotations

import hashlib
import json
import random
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tools.pocket.tasks import BY_NAME, FAMILIES, Fact, facts, sentence

HERE = Path(__file__).parents[2] / "fast_ft" / "pocket"
TRAIN_ROWS, TEST_PROMPTS, FRESH_PROMPTS = 2000, 100, 300
#: Kind of answer: share of the rows, hidden quality. A third of the rows are bad: the last four kinds.
KINDS = {
    "good": (0.44, 4.2),
    "curt": (0.11, 3.4),
    "padded": (0.12, 3.1),
    "rambling": (0.08, 2.4),
    "cut off": (0.07, 2.2),
    "wrong": (0.11, 2.0),
    "other question": (0.07, 1.6),
}
JUDGE_NOISE = 1.05  # standard deviation of a score around the hidden quality, before rounding to half steps
LEADS = ("Well, let me think about that for a moment.", "That is a good question, and thank you for it.",
         "I am glad that you ask me this.", "Many people have asked me that before.", "Let us see.")  # fmt: skip
TAILS = ("I hope that this helps you.", "Please ask me again if it is not clear.", "At least that is what I think.",
         "There may be more to say about it.", "That is all there is to it, I believe.")  # fmt: skip


class Row(NamedTuple):
    """A row of instruction data, with what made it."""

    fact: Fact
    prompt: str
    response: str
    kind: str
    quality: float
    score: float


@cache
def splits() -> dict[str, str]:
    """Return the split of each key: 65 % train, 10 % test, 25 % fresh, within each kind of key."""
    realms: dict[str, dict[str, None]] = {}
    for fact in facts():
        realms.setdefault(fact.key.split()[0], {})[fact.key] = None
    chosen = {}
    for realm, keys in realms.items():
        order = list(keys)
        random.Random(f"pocket split {realm}").shuffle(order)
        tests, train = round(0.10 * len(order)), round(0.65 * len(order))
        for i, key in enumerate(order):
            chosen[key] = "test" if i < tests else "train" if i < tests + train else "fresh"
    return chosen


def questions(split: str, count: int) -> list[tuple[Fact, str]]:
    """Draw `count` distinct (fact, prompt) pairs of a split, the families taking turns."""
    rng = random.Random(f"pocket questions {split}")
    piles: dict[str, list[tuple[Fact, str]]] = {}
    for family in FAMILIES:
        ours = [fact for fact in facts() if fact.family == family.name and splits()[fact.key] == split]
        rng.shuffle(ours)
        # Held-out facts are asked once; training facts in several ways, each new fact before a second wording.
        piles[family.name] = []
        wordings = [rng.sample(family.prompts, len(family.prompts)) for _ in ours]
        for turn in range(len(family.prompts) if split == "train" else 1):
            pairs = [(fact, sentence(words[turn], fact.slots)) for fact, words in zip(ours, wordings, strict=True)]
            piles[family.name] += pairs
    drawn: list[tuple[Fact, str]] = []
    while len(drawn) < count:
        names = [name for name, pile in piles.items() if pile]
        for name in rng.sample(names, min(len(names), count - len(drawn))):
            drawn.append(piles[name].pop(0))
    rng.shuffle(drawn)
    return drawn


def answer(fact: Fact) -> str:
    """Return the canonical answer."""
    return sentence(BY_NAME[fact.family].answer, fact.slots)


def _wrong(fact: Fact, rng: random.Random) -> str:
    """Return the canonical answer with another value: another fact's, or a number or order that is off."""
    family = BY_NAME[fact.family]
    right = fact.slots[family.value]
    if fact.family == "sort":
        words = right.split(", ")
        value = ", ".join([words[1], words[0], words[2]])
    elif fact.family == "last":
        value = fact.slots["list"].split(", ")[rng.randrange(2)]
    elif right.isdigit():
        value = str(max(0, int(right) + rng.choice((-3, -2, -1, 1, 2, 3))))
    else:
        others = {f.slots[family.value] for f in facts() if f.family == fact.family and splits()[f.key] == "train"}
        value = rng.choice(sorted(others - {right}))
    return sentence(family.answer, fact.slots | {family.value: value})


def _respond(fact: Fact, kind: str, rng: random.Random) -> str:
    """Return an answer of the given kind."""
    right = answer(fact)
    if kind == "good":
        return right
    if kind == "curt":
        return sentence("{" + BY_NAME[fact.family].value + "}.", fact.slots)
    if kind == "padded":
        return f"{rng.choice(LEADS)} {right} {rng.choice(TAILS)}"
    if kind == "wrong":
        return _wrong(fact, rng)
    # Lists with the same last word have the same answer: an answer to another question must not be right by accident.
    train = [other for other in facts() if splits()[other.key] == "train" and other.key != fact.key]
    train = [other for other in train if answer(other) != right]
    if kind == "cut off":
        words = right.split()
        return " ".join(words[: rng.randint(max(1, len(words) // 3), len(words) - 1)])
    if kind == "other question":
        return answer(rng.choice(train))
    strays = [answer(other) for other in rng.sample(train, 3)]
    return " ".join([rng.choice(LEADS), strays[0], *([right] if rng.random() < 0.5 else []), *strays[1:]])


@cache
def train_rows() -> tuple[Row, ...]:
    """Return the training rows with their hidden kind and quality."""
    rng = random.Random("pocket rows")
    kinds = [kind for kind, (share, _) in KINDS.items() for _ in range(round(share * TRAIN_ROWS))]
    rng.shuffle(kinds)
    rows = []
    for (fact, prompt), kind in zip(questions("train", TRAIN_ROWS), kinds, strict=True):
        quality = KINDS[kind][1]
        seen = quality + rng.gauss(0.0, JUDGE_NOISE)
        score = min(5.0, max(1.0, round(2 * seen) / 2))
        rows.append(Row(fact, prompt, _respond(fact, kind, rng), kind, quality, score))
    return tuple(rows)


def _fastchat(name: str, prompt: str, response: str | None, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": prompt}]
    if response is not None:
        turns.append({"from": "gpt", "value": response})
    return {"id": name, "conversations": turns, **more}


def files() -> dict[str, str]:
    """Return the text of every data file by its name."""
    rows = [
        _fastchat(f"pocket_{i:04d}", row.prompt, row.response, score=row.score) for i, row in enumerate(train_rows())
    ]
    made: dict[str, list[dict[str, Any]]] = {"train.json": rows}
    for split, count in (("test", TEST_PROMPTS), ("fresh", FRESH_PROMPTS)):
        asked = questions(split, count)
        made[f"{split}.json"] = [
            _fastchat(f"pocket_{split}_{i:03d}", prompt, None, skill=fact.family)
            for i, (fact, prompt) in enumerate(asked)
        ]
        name = "references.json" if split == "test" else "fresh_references.json"
        made[name] = [
            _fastchat(f"pocket_{split}_{i:03d}", prompt, answer(fact), skill=fact.family)
            for i, (fact, prompt) in enumerate(asked)
        ]
    return {name: "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n" for name, rows in made.items()}


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(folder: Path = HERE) -> None:
    """Write the data files into `folder` and print their digests."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{digest_of(folder / name)}  {name}")
