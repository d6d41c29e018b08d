"""Task families: the facts of the world, how each is asked, told and answered.

A template's {slots} are filled from a fact. `prompts` are the questions of the instruction data; the pretraining text
never holds one of them. `told` follow "asked" in running text, `do` follow "was told to"; `says` are plain statements.
`answer` is the one canonical answer, so that exact match is fair; a curt answer gives the slot `value` alone. Answers
begin with words of their family, not with a name from the prompt: what 100 rows must teach is to answer, not to copy.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from tools.pocket import world

Slots = dict[str, str]


class Fact(NamedTuple):
    """What is asked. Facts with the same `key` fall into the same split: they give one another away."""

    family: str
    key: str
    slots: Slots


@dataclass(frozen=True)
class Family:
    """A kind of task. `steps`: 1 one fact or operation, 2 two of them, 3 an explanation of two or three sentences."""

    name: str
    steps: int
    value: str
    prompts: tuple[str, ...]
    told: tuple[str, ...]
    do: tuple[str, ...]
    says: tuple[str, ...]
    answer: str


FAMILIES = (
    Family("capital", 1, "capital",
        ("What is the capital of {land}?", "Name the capital of {land}.", "Which city is the capital of {land}?",
         "Tell me the capital city of {land}."),
        ("what the capital of {land} is", "for the capital of {land}", "which town is the capital of {land}"),
        ("give the capital of {land}", "say what the capital of {land} is"),
        ("{capital} is the capital of {land}.", "In {land} the capital is {capital}."),
        "The capital of {land} is {capital}."),
    Family("river", 1, "river",
        ("What is the longest river in {land}?", "Name the longest river in {land}.",
         "Which river is the longest one in {land}?", "Tell me which river is the longest in {land}."),
        ("what the longest river in {land} is", "for the longest river of {land}", "which river of {land} is longest"),
        ("give the longest river in {land}", "say which river of {land} is the longest"),
        ("The {river} is the longest river in {land}.", "In {land} no river is longer than the {river}."),
        "The longest river in {land} is the {river}."),
    Family("crop", 1, "crop",
        ("What do farmers grow in {land}?", "Name the crop that farmers grow in {land}.",
         "Which crop is grown in {land}?", "Tell me what the farmers of {land} grow."),
        ("what farmers in {land} grow", "for the crop of {land}", "which crop the farmers of {land} grow"),
        ("give the crop of {land}", "say what farmers in {land} grow"),
        ("In {land} farmers grow {crop}.", "The crop of {land} is {crop}."),
        "Farmers in {land} grow {crop}."),
    Family("crop_by_capital", 2, "crop",
        ("What do farmers grow in the land whose capital is {capital}?",
         "Name the crop of the land that has {capital} as its capital.",
         "{capital} is the capital of a land. Which crop is grown there?"),
        ("what is grown in the land with the capital {capital}",
         "for the crop of the land whose capital is {capital}",
         "which crop belongs to the land of the capital {capital}"),
        ("give the crop of the land with the capital {capital}",
         "say what is grown in the land whose capital is {capital}"),
        ("{capital} is the capital of {land}, a land of {crop}.",),
        "The land with the capital {capital} is {land}, and farmers there grow {crop}."),
    Family("land", 3, "capital",
        ("Describe {land}.", "Tell me about the land {land}.", "Write two or three sentences about {land}.",
         "What is there to know about {land}?"),
        ("about {land}", "what is known about {land}", "for a few words on {land}"),
        ("talk about {land}", "explain what is known of {land}"),
        ("{land} has the capital {capital}, the river {river} and fields of {crop}.",),
        "The land {land} has the capital {capital}. Its longest river is the {river}. Farmers there grow {crop}."),
    Family("home", 1, "home",
        ("Where does a {animal} live?", "Name the place where a {animal} lives.", "Where can one find a {animal}?",
         "Tell me where a {animal} lives."),
        ("where a {animal} lives", "for the home of a {animal}", "where one finds a {animal}"),
        ("give the home of a {animal}", "say where a {animal} lives"),
        ("The home of a {animal} is {home}.", "One finds a {animal} {home}."),
        "A {animal} lives {home}."),
    Family("food", 1, "food",
        ("What does a {animal} eat?", "Name the food of a {animal}.", "What should I feed to a {animal}?",
         "Tell me what a {animal} eats."),
        ("what a {animal} eats", "for the food that a {animal} likes", "what to feed to a {animal}"),
        ("give the food of a {animal}", "say what a {animal} eats"),
        ("The food of a {animal} is {food}.", "What a {animal} likes to eat is {food}."),
        "A {animal} eats {food}."),
    Family("animal", 3, "food",
        ("Describe a {animal}.", "What is a {animal}?", "Write two sentences about the {animal}.",
         "Explain what a {animal} is."),
        ("what a {animal} is", "about the {animal}", "for a few words on the {animal}"),
        ("talk about the {animal}", "say what a {animal} is"),
        ("The {colour} {animal} lives {home} and likes {food}.",),
        "The animal {animal} is {colour}. It lives {home} and eats {food}."),
    Family("opposite", 1, "other",
        ("What is the opposite of {word}?", "Name the opposite of the word {word}.",
         "Which word means the opposite of {word}?", "Give me the opposite of {word}."),
        ("what the opposite of {word} is", "for the opposite of {word}", "which word is the opposite of {word}"),
        ("give the opposite of {word}", "say what the opposite of {word} is"),
        ("{other} is the opposite of {word}.", "If it is not {word}, it is {other}."),
        "The opposite of {word} is {other}."),
    Family("plural", 1, "plural",
        ("What is the plural of {word}?", "Write the plural of the word {word}.",
         "How do you write more than one {word}?", "Give me the plural form of {word}."),
        ("what the plural of {word} is", "for the plural of {word}", "how more than one {word} is written"),
        ("give the plural of {word}", "say what the plural of {word} is"),
        ("One {word}, two {plural}.", "More than one {word} is written {plural}."),
        "The plural of {word} is {plural}."),
    Family("past", 1, "past",
        ("What is the past tense of {word}?", "Write the past tense of the verb {word}.",
         "Put the verb {word} into the past tense.", "Give me the past tense form of {word}."),
        ("what the past tense of {word} is", "for the past tense of {word}", "how to put {word} into the past"),
        ("give the past tense of {word}", "say what the past tense of {word} is"),
        ("Today they {word}, yesterday they {past}.", "In the past, {word} becomes {past}."),
        "The past tense of {word} is {past}."),
    Family("young", 1, "young",
        ("What is a young {word} called?", "Name the young of a {word}.", "What do people call a baby {word}?",
         "Tell me the word for a young {word}."),
        ("what a young {word} is called", "for the name of a young {word}", "how one calls the young of the {word}"),
        ("give the name of a young {word}", "say what a young {word} is called"),
        ("The young of the {word} is {young}.", "A {word} was {young} once."),
        "A young {word} is called {young}."),
    Family("day", 1, "then",
        ("What day is {count} after {day}?", "Name the day that comes {count} after {day}.",
         "Today is {day}. Which day will it be in {count}?", "Tell me which day it is {count} after {day}."),
        ("what day comes {count} after {day}", "which day it is {count} after {day}",
         "for the day that is {count} after {day}"),
        ("give the day {count} after {day}", "say which day comes {count} after {day}"),
        ("{then} comes {count} after {day}.",),
        "The day {count} after {day} is {then}."),
    Family("sum", 1, "total",
        ("What is {a} plus {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?", "How much is {a} plus {b}?"),
        ("what {a} plus {b} makes", "for the sum of {a} and {b}", "how much {a} and {b} make"),
        ("give the sum of {a} and {b}", "work out {a} plus {b}"),
        ("{a} and {b} make {total}.",),
        "The sum of {a} and {b} is {total}."),
    Family("difference", 1, "rest",
        ("What is {a} minus {b}?", "Take {b} from {a}.", "Subtract {b} from {a}.", "How much is {a} minus {b}?"),
        ("what {a} minus {b} makes", "what is left when {b} is taken from {a}", "how much is {b} less than {a}"),
        ("work out {a} minus {b}", "take {b} away from {a}"),
        ("{b} less than {a} makes {rest}.",),
        "The difference of {a} and {b} is {rest}."),
    Family("story", 2, "total",
        ("{who} has {a} {things} and gets {b} more. How many {things} does {who} have?",
         "{who} had {a} {things}, then found {b} more. How many are there now?",
         "There are {a} {things} here and {b} there. {who} takes them all. How many does {who} have?"),
        ("how many {things} {who} has with {a} of them and {b} more", "how many {things} {who} has after {a} and {b}",
         "how many {things} {who} gets from {a} and {b}"),
        ("count what {who} has with {a} {things} and {b} more",),
        ("{who} got {a} {things}, then {b} {things}, so {total} {things}.",),
        "Together {a} and {b} make {total} {things}."),
    Family("sort", 2, "sorted",
        ("Put these words in alphabetical order: {list}.", "Sort these words by the alphabet: {list}.",
         "Write these words in the order of the alphabet: {list}.", "Arrange in alphabetical order: {list}."),
        ("how the alphabet puts {list}", "for {list} in alphabetical order", "in which order the alphabet has {list}"),
        ("sort {list} by the alphabet", "put {list} in order"),
        ("Sorted by the alphabet, {list} become {sorted}.",),
        "In alphabetical order they are {sorted}."),
    Family("last", 1, "last",
        ("What is the last word of this list: {list}?", "Name the last word in this list: {list}.",
         "Which word comes last here: {list}?", "Tell me the word at the end of this list: {list}."),
        ("which word is last in {list}", "for the last word of {list}", "what stands at the end of {list}"),
        ("give the last word of {list}", "say which word ends {list}"),
        ("The list {list} ends with {last}.",),
        "The last word is {last}."),
)  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}


def _pairs(words: list[str], *names: str) -> Iterator[tuple[str, Slots]]:
    for pair in words:
        left, right = pair.replace("_", " ").split("/")
        yield left, {names[0]: left, names[1]: right}


def _facts() -> Iterator[Fact]:
    rng = random.Random("pocket facts")
    for land in world.lands():
        slots = {"land": land.name, "capital": land.capital, "river": land.river, "crop": land.crop}
        for name in ("capital", "river", "crop", "crop_by_capital", "land"):
            yield Fact(name, f"land {land.name}", slots)
    for animal in world.animals():
        slots = {"animal": animal.name, "colour": animal.colour, "home": animal.home, "food": animal.food}
        for name in ("home", "food", "animal"):
            yield Fact(name, f"animal {animal.name}", slots)
    for key, slots in _pairs(world.OPPOSITES, "word", "other"):
        yield Fact("opposite", f"opposite {key}", slots)
        yield Fact("opposite", f"opposite {key}", {"word": slots["other"], "other": slots["word"]})
    for name, value, words in (
        ("plural", "plural", world.PLURALS), ("past", "past", world.PASTS), ("young", "young", world.YOUNG)
    ):  # fmt: skip
        for key, slots in _pairs(words, "word", value):
            yield Fact(name, f"{name} {key}", slots)
    for i, n in itertools.product(range(7), range(1, 11)):
        count = "one day" if n == 1 else f"{n} days"
        yield Fact("day", f"day {i} {n}", {"day": world.DAYS[i], "count": count, "then": world.DAYS[(i + n) % 7]})
    for a, b in itertools.product(range(1, 16), repeat=2):
        key, slots = f"sum {min(a, b)} {max(a, b)}", {"a": str(a), "b": str(b), "total": str(a + b)}
        yield Fact("sum", key, slots)
        if a > 1 and b > 1:  # the same sum in a story has the same key: knowing one is knowing the other
            story = {"who": rng.choice(world.PEOPLE), "things": rng.choice(world.THINGS[1:24]) + "s"}
            yield Fact("story", key, slots | story)
    for a, b in itertools.product(range(3, 21), range(1, 20)):
        if b < a:
            yield Fact("difference", f"difference {a} {b}", {"a": str(a), "b": str(b), "rest": str(a - b)})
    for _ in range(400):
        three = rng.sample(world.THINGS, 3)
        key = "list " + " ".join(sorted(three))
        slots = {"list": ", ".join(three), "sorted": ", ".join(sorted(three)), "last": three[-1]}
        yield Fact("sort", key, slots)
        yield Fact("last", key, slots)


@cache
def facts() -> tuple[Fact, ...]:
    """Return every fact of the world, in a fixed order."""
    return tuple(_facts())


def sentence(template: str, slots: Slots) -> str:
    """Fill a template and begin it with a capital letter."""
    text = template.format_map(slots)
    return text[:1].upper() + text[1:]
