"""What the doctor found: one finding, how all of them are printed, and whether a run would work."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import dataclass
from typing import Any, Literal

from fast_ft.common.text_safety import plain
from fast_ft.common.wording import counted

Level = Literal["fine", "note", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """`level`: fine; note: good to know; warning: a run may suffer; broken: a run would fail. `remedy`: what to do."""

    name: str
    level: Level
    text: str
    remedy: str = ""


def print_findings(findings: list[Finding]) -> None:
    """Print one line for each finding, its remedy below it, and a last line that sums up."""
    width = max(40, shutil.get_terminal_size((100, 24)).columns)
    words = {"fine": "fine", "note": "note", "warning": "WARNING", "broken": "BROKEN"}
    for each in findings:
        head = f"{words[each.level]:8} {plain(each.name):14} "
        print(textwrap.fill(plain(each.text), width, initial_indent=head, subsequent_indent=" " * len(head)))
        if each.remedy:
            print(textwrap.fill(plain(f"-> {each.remedy}"), width, initial_indent=" " * len(head),
                                subsequent_indent=" " * (len(head) + 3)))  # fmt: skip
    broken = list(dict.fromkeys(each.name for each in findings if each.level == "broken"))
    warned = sum(each.level == "warning" for each in findings)
    end = f"broken: {', '.join(broken)}: a run would fail" if broken else "a run will work here"
    print(f"\n{plain(end)}" + (f"; {counted(warned, 'warning')}" if warned else ""))


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """Return {"works": bool, "findings": [{name, level, text, remedy}]}."""
    return {"works": works(findings), "findings": [vars(each) for each in findings]}


def works(findings: list[Finding]) -> bool:
    """Return whether a run would get through."""
    return all(each.level != "broken" for each in findings)
