"""Running text about the pocket world, for pretraining: statements and reported talk, never an instruction.

A paragraph tells of one land or animal, strings statements together, or reports who asked what and what came back. No
prompt of the instruction data stands in it (tests/pocket/test_pocket.py looks), and neither does "[INST]".
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

from tools.pocket import world
from tools.pocket.tasks import BY_NAME, FAMILIES, Fact, facts, sentence

#: How often a family is drawn: long answers, sorting and arithmetic are learned more slowly.
WEIGHTS = {
    "land": 2.0, "animal": 1.5, "crop_by_capital": 2.0, "day": 2.0,
    "sum": 3.0, "difference": 3.0, "story": 3.0, "sort": 3.0,
}  # fmt: skip
ASKED = (
    "{who} asked {told}. {answer}", "{who} asked {told}, and {other} answered: {answer}",
    "When asked {told}, people say: {answer}", "{who} wanted to know {told}. {answer}",
    "Somebody asked {told}. The reply was this. {answer}",
)  # fmt: skip
ASKED_ONLY = ("{who} asked {told}. {says}", "When {who} asked {told}, {other} said: {says}")
TOLD_TO = (
    "{who} was told to {do}. {answer}", "{other} told {who} to {do}. {answer}",
    "{who} had to {do} and said: {answer}",
)  # fmt: skip


@cache
def _held_lists() -> frozenset[str]:
    return frozenset(fact.key for fact in facts() if fact.key.startswith("list "))


@cache
def _by_family() -> dict[str, list[Fact]]:
    return {family.name: [fact for fact in facts() if fact.family == family.name] for family in FAMILIES}


def draw(rng: random.Random) -> Fact:
    """Draw a fact for the text; lists of words are made up on the spot and never those of the instruction data."""
    family = rng.choices(FAMILIES, [WEIGHTS.get(family.name, 1.0) for family in FAMILIES])[0].name
    while family in ("sort", "last"):
        three = rng.sample(world.THINGS, 3)
        if (key := "list " + " ".join(sorted(three))) not in _held_lists():
            slots = {"list": ", ".join(three), "sorted": ", ".join(sorted(three)), "last": three[-1]}
            return Fact(family, key, slots)
    fact = rng.choice(_by_family()[family])
    if family == "story":
        people = {"who": rng.choice(world.PEOPLE), "things": rng.choice(world.THINGS[1:24]) + "s"}
        return fact._replace(slots=fact.slots | people)
    return fact


def _reported(fact: Fact, rng: random.Random) -> str:
    family = BY_NAME[fact.family]
    who, other = rng.sample(world.PEOPLE, 2)
    slots = {"who": who, "other": other, "answer": sentence(family.answer, fact.slots),
             "says": sentence(rng.choice(family.says), fact.slots)}  # fmt: skip
    if rng.random() < 0.35:
        return rng.choice(TOLD_TO).format(do=rng.choice(family.do).format_map(fact.slots), **slots)
    frame = rng.choice(ASKED if rng.random() < 0.85 else ASKED_ONLY)
    return frame.format(told=rng.choice(family.told).format_map(fact.slots), **slots)


def _statement(fact: Fact, rng: random.Random) -> str:
    family = BY_NAME[fact.family]
    return sentence(rng.choice((family.answer, *family.says)), fact.slots)


def paragraph(rng: random.Random) -> str:
    """Return one paragraph of two to five sentences or exchanges."""
    kind = rng.random()
    if kind < 0.8:
        return " ".join(_reported(draw(rng), rng) for _ in range(rng.randint(2, 4)))
    if kind < 0.9:
        return " ".join(_statement(draw(rng), rng) for _ in range(rng.randint(3, 5)))
    key = rng.choice([fact.key for fact in (*_by_family()["land"], *_by_family()["animal"])])
    told = [_statement(fact, rng) for fact in facts_about(key)]
    rng.shuffle(told)
    return " ".join(told)


@cache
def facts_about(key: str) -> tuple[Fact, ...]:
    """Return the facts that share a key."""
    return tuple(fact for fact in facts() if fact.key == key)


def paragraphs(seed: int) -> Iterator[str]:
    """Yield paragraphs without end; the same seed gives the same ones."""
    rng = random.Random(f"pocket text {seed}")
    while True:
        yield paragraph(rng)
