"""The words of a command line that are no options: which are overrides (lora.r=32), and which are files and folders.

An override may stand anywhere. A word with "=" is a path where it cannot be a key's (runs/a=b, ./a=b), where no recipe
has such a section and the path exists, where a path is missing otherwise, and behind "--".
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from fast_ft.common.console import note
from fast_ft.common.errors import InputError, nearest

_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"  #: what word processors make of a hyphen


class Places(NamedTuple):
    """What a command takes besides options, as its usage says it: `least` to `most` paths, stored as `dest`."""

    usage: str
    dest: str
    least: int = 1
    most: int = 1

    @property
    def name(self) -> str:
        """What usage calls a path, such as RUN_DIR."""
        return self.usage.partition(" ")[0].strip("[]")

    @property
    def overrides(self) -> bool:
        """Whether the command takes key=value too."""
        return "key=value" in self.usage


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose refusals are InputErrors that say the option, its value and the remedy."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError for what argparse says; its own `error` prints the usage and ends the process."""
        raise InputError(self._in_words(message))

    def _in_words(self, message: str) -> str:
        if match := re.match(r"the following arguments are required: (.*)", message):
            missing = [self._option(name) for name in match[1].split(", ")]
            return "; ".join(f"{_written(action)} is missing: {action.help}" for action in missing)
        if match := re.match(r"ambiguous option: (\S+) could match (.*)", message):
            return f"{match[1]}: it may be {match[2].replace(', ', ' or ')}: write the whole option"
        match = re.match(r"argument (?:-\w/)?(--[\w-]+): (.*)", message, re.S)
        if match is None:
            return message
        action, said = self._option(match[1]), match[2]
        if said == "expected one argument":
            return f"{match[1]}: its value is missing. Write {_written(action)}: {action.help}"
        if value := re.match("invalid float value: (.*)", said):
            return f"{match[1]} {value[1]}: it takes a number: {action.help}"
        if value := re.match("invalid choice: (.*) \\(choose", said):
            return f"{match[1]} {value[1]}: it takes {' or '.join(action.choices or ())}"
        if value := re.match("ignored explicit argument (.*)", said):
            return f"{match[1]}: it takes no value: leave {value[1]} out"
        return f"{match[1]} {said}"

    def _option(self, name: str) -> argparse.Action:
        return next(action for action in self._actions if name in action.option_strings)


def whole(least: int) -> Callable[[str], int]:
    """Return what reads an option's whole number, at least `least`."""

    def read(text: str) -> int:
        """Return the number. Raises ArgumentTypeError."""
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: it takes a whole number, at least {least}")
        return int(text)

    return read


def parse(command: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Return a command's options, its paths and `overrides` among them; say which override another one replaces.

    Raises InputError where a word is wrong. argparse itself ends the process for -h.
    """
    if "" in words:
        raise InputError("a word is empty (an unset variable of the shell?): leave it out, or fill it")
    if problem := wrong_dash(words):
        raise InputError(problem)
    end = words.index("--") if "--" in words else len(words)
    options, unknown = command.parse_known_intermixed_args(list(words[:end]))
    if unknown:
        raise InputError(unknown_option(unknown, re.findall(r"^ +(?:-\w, )?(--[\w-]+)", command.format_help(), re.M)))
    if empty := [name for name, value in vars(options).items() if value == ""]:
        raise InputError(f"--{empty[0].replace('_', '-')}: the value is empty: leave the option out, or fill it")
    places = options.places
    paths, overrides = sort(options.words, words[end + 1 :], places)
    if paths:  # else the default stands
        setattr(options, places.dest, paths if places.most > 1 else paths[0])
    options.overrides, notes = last_of_each(overrides)
    for text in notes:
        note(text)
    return options


def sort(words: Sequence[str], behind: Sequence[str], places: Places) -> tuple[list[str], list[str]]:
    """Return (paths, overrides). `behind` stood behind "--". Raises InputError where a word fits nowhere."""
    overrides = [word for word in words if places.overrides and is_override(word)]
    paths = [word for word in words if word not in overrides] + list(behind)
    for word in words if not places.overrides else ():
        if is_override(word) and _is_key(word.partition("=")[0]) and not Path(word).exists():
            raise InputError(f"{word!r}: this command changes no keys; it takes {places.name or 'options'} only")
    if len(paths) < places.least:  # a folder may be called lora.r=32
        paths += (there := [word for word in overrides if Path(word).exists()][: places.least - len(paths)])
        overrides = [word for word in overrides if word not in there]
    if len(paths) > places.most:
        raise InputError(_too_many(paths, overrides, places))
    if len(paths) < places.least:
        taken = f"; {overrides[0]!r} is taken for an override, and ./{overrides[0]} for a path" if overrides else ""
        raise InputError(f"{places.name} is missing{taken}")
    return paths, overrides


def is_override(word: str) -> bool:
    """Return whether a word gives a recipe's key a value, be the key misspelt, as far as the word itself shows."""
    head, equals, _ = word.partition("=")
    if not equals or not re.fullmatch(r"[^/\\~]+", head) or head.startswith(("-", "./", "../")):
        return False
    return _is_key(head) or not Path(word).exists()


def last_of_each(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (the overrides that count, a note for each that a later one of the same key or section replaces)."""
    keys = [override.partition("=")[0].strip() for override in overrides]
    counting, notes = [], []
    for i, (key, override) in enumerate(zip(keys, overrides, strict=True)):
        later = [j for j in range(i + 1, len(keys)) if key == keys[j] or key.startswith(f"{keys[j]}.")]
        if later:
            notes.append(f"note: {override} does not count, since {overrides[later[-1]]} comes later")
        else:
            counting.append(override)
    return counting, notes


def unknown_option(words: Sequence[str], options: Sequence[str]) -> str:
    """Return what is wrong with words of which the first is an unknown option."""
    option, equals, value = words[0].partition("=")
    if _is_key(option.strip("-")):
        value = value if equals else next((word for word in words[1:] if not word.startswith("-")), "VALUE")
        return f"{words[0]}: a recipe's key is written without dashes, as one word: {option.strip('-')}={value}"
    known = nearest(option, options) or f"; there are {', '.join(options)}"
    return f"{option}: this command has no such option{known}"


def wrong_dash(words: Sequence[str]) -> str | None:
    """Return what is wrong where a word begins with a dash that is not the keyboard's, as copied text has."""
    for word in words:
        if word and word[0] in _DASHES:
            rest = word.lstrip(f"{_DASHES}-")
            plain = f"{'--' if len(rest) > 1 else '-'}{rest}"
            return f"{word!r} begins with a dash that is no hyphen (U+{ord(word[0]):04X}): write {plain}"
    return None


def _is_key(head: str) -> bool:
    from fast_ft.recipe.schema import Recipe  # late: --help need not wait for it

    return head.strip().split(".")[0] in Recipe.model_fields


def _written(action: argparse.Action) -> str:
    """Return an option with its value, as it is typed."""
    return f"{action.option_strings[0]} {action.metavar or '|'.join(action.choices or ())}"


def _too_many(paths: list[str], overrides: list[str], places: Places) -> str:
    if key := _split_key(paths, overrides):
        behind = paths[paths.index(key) + 1 :] if key in paths else paths[::-1]
        value = next((word.strip("=") for word in behind if word != "="), "VALUE")
        key = key.strip("=")
        return f"{key!r}: a key and its value are one word, without spaces, as in {key}={value}"
    if places.most == 0:
        return f"{paths[0]!r}: this command takes options only"
    takes = f"one {places.name}" if places.most == 1 else f"at most {places.most} {places.name}"
    return f"{paths[places.most]!r} is one word too many: this command takes {takes}"


def _split_key(paths: list[str], overrides: list[str]) -> str | None:
    """Return the key of "lora.r = 32", "lora.r 32" or "lora.r= 32", where there is one."""
    for word, after in zip(paths, [*paths[1:], ""], strict=True):
        if _is_key(word) and ("." in word or after.startswith("=")) and not Path(word).exists():
            return word
    return next((word for word in overrides if word.endswith("=")), None)
