"""What `runs` prints: one line a run, grouped by recipe; one JSON object; and the question before runs are deleted."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import escaped
from fast_ft.common.wording import counted
from fast_ft.homework.ledger import Attempt, Ledger
from fast_ft.judge.kinds import KINDS
from fast_ft.run import prune, time_spent
from fast_ft.run.listing import ListedRun, differing, unusual

_SHOWN = 10  #: runs of one recipe without --all
_KEYS = 3  #: settings in a line
_FOLDER = 28  #: characters of a folder's name in a line
_WIDTH = 100  #: columns where no terminal says how many there are
_RECENT = dt.timedelta(days=180)  #: of these the hour is said, of others the year, as `ls` does


def print_runs(ledger: Ledger, root: Path, *, all_runs: bool = False) -> None:
    """Print the runs by recipe, the recipe with the newest run last, and what the ledger has to say of them.

    all_runs: every run, each with all the settings that are not the same in all runs of its recipe.
    """
    if not ledger.attempts:
        print(f"no runs in {root} yet")
        return
    width = _width()
    groups = _by_recipe(ledger.attempts)
    lines = [f"{counted(len(ledger.attempts), 'run')} of {counted(len(groups), 'recipe')} in {root}"]
    for recipe, attempts in groups.items():
        lines += _group(recipe, attempts, all_runs, width)
    if not all_runs and any(differing(_runs(attempts))[0] for attempts in groups.values()):
        lines += [
            "",
            "A line shows settings that most runs of the recipe do not share. --all shows every one that differs.",
        ]
    for line in lines:
        print(escaped(line) if all_runs else _cut(escaped(line), width))
    for sentence in ledger.sentences():
        print(escaped(sentence))


def as_json(ledger: Ledger) -> dict[str, Any]:
    """Return `runs --json`: runs (oldest first) and sentences. `differs` has the settings that vary in one recipe."""
    found = []
    for attempts in _by_recipe(ledger.attempts).values():
        for attempt, differs in zip(attempts, differing(_runs(attempts)), strict=True):
            run = attempt.run
            judge = run.scores.judge if run.scores is not None else None
            found.append(
                {
                    "folder": str(run.folder),
                    "run_name": run.name or None,
                    "recipe": run.recipe,
                    "started": run.manifest.started,
                    "state": run.state,
                    "minutes": round(run.minutes, 2),
                    "score": run.score,
                    "judge": None if judge is None else dict(zip(("kind", "model", "rubric"), judge, strict=True)),
                    "public_score": attempt.public,
                    "differs": differs,
                }
            )
    return {"runs": sorted(found, key=lambda run: run["started"]), "sentences": ledger.sentences()}


def prune_runs(runs: Sequence[ListedRun], root: Path, *, unasked: bool = False) -> None:
    """Delete the runs that failed or are unfinished, after a question on the terminal, or `unasked`.

    Raises InputError where there is no terminal to ask on, or where a run could not be deleted.
    """
    chosen, kept = prune.candidates(runs, root)
    for sentence in kept:
        note(f"note: {sentence}")
    if not chosen:
        note(f"no failed or unfinished run in {root} to delete")
        return
    width = max(len(str(run.folder)) for run in chosen)
    for run in chosen:
        trained = f"{time_spent.shown(run.train_minutes)} minutes of training"
        note(f"{run.folder!s:{width}}  {run.state}, {trained}, begun {_when(run.manifest.started).strip()}")
    if any(run.manifest.recipe.get("rules") for run in chosen):
        note("note: the homework's sum of training minutes, which `runs` prints, will no longer count these runs")
    if not unasked and not _agreed(f"Delete {counted(len(chosen), 'run folder')} for good? [y/N] "):
        note("nothing was deleted")
        return
    refused = []
    for run in chosen:
        try:
            prune.delete(run)
            note(f"deleted: {run.folder}")
        except InputError as error:
            refused.append(str(error))
    if refused:
        raise InputError("\n".join(refused))


def _agreed(question: str) -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        raise InputError("--prune asks before it deletes, and stdin is no terminal: add --yes to delete unasked")
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _by_recipe(attempts: Sequence[Attempt]) -> dict[str, list[Attempt]]:
    """Return {recipe: its runs, the oldest first}, the recipe with the newest run last."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in reversed(attempts):
        groups.setdefault(attempt.run.recipe, []).insert(0, attempt)
    return dict(reversed(groups.items()))


def _group(recipe: str, attempts: Sequence[Attempt], all_runs: bool, width: int) -> list[str]:
    """Return a recipe's lines."""
    shown = attempts if all_runs else attempts[-_SHOWN:]
    table = [(_cells(attempt, all_runs)) for attempt in shown]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(table[0]))]
    settings = (differing if all_runs else unusual)(_runs(attempts))[-len(shown) :]
    older = len(attempts) - len(shown)
    lines = ["", recipe + (f" ({counted(older, 'older run')} left out; --all shows them)" if older else "")]
    for attempt, cells, values in zip(shown, table, settings, strict=True):
        line = "  " + "  ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True) if w)
        name = attempt.run.name
        if all_runs:
            lines.append(f"{line}  {name}".rstrip())
            lines += [f"      {key}={_value(value)}" for key, value in values.items()]
        else:
            room = width - len(line) - 2 - (len(name) + 2 if name else 0)
            told = _settings(values, attempt.run.settings, room)
            lines.append(f"{line}  {': '.join(filter(None, [name, told]))}".rstrip())
    return lines


def _cells(attempt: Attempt, whole: bool) -> tuple[str, ...]:
    """Return a run's line but for its settings: when, folder, state, minutes, score by judge, public score."""
    run = attempt.run
    folder = run.folder.name
    if len(folder) > _FOLDER and not whole:
        folder = f"{folder[: _FOLDER - 11]}...{folder[-8:]}"
    minutes = f"{time_spent.shown(run.minutes)} min"
    public = "" if attempt.public is None else f"public {attempt.public:g}"
    return _when(run.manifest.started), folder, run.state, minutes.rjust(9), _score(run), public


def _score(run: ListedRun) -> str:
    if run.scores is None or run.score is None:
        return ""
    if KINDS[run.scores.kind].is_share:
        return f"{run.score:.0%} {run.scores.kind}"
    return f"{run.score:.2f} {run.scores.model or run.scores.kind}"


def _settings(values: Mapping[str, Any], all_settings: Mapping[str, Any], room: int) -> str:
    """Return the first settings, as many as `room` columns take, at least one, and "+ N" for the others."""
    leaves = [key.rpartition(".")[2] for key in all_settings]
    texts = []
    for key, value in values.items():
        leaf = key.rpartition(".")[2]
        texts.append(f"{leaf if leaves.count(leaf) <= 1 else key}={_value(value)}")
    for count in range(min(_KEYS, len(texts)), 0, -1):
        rest = f" + {len(texts) - count}" if len(texts) > count else ""
        text = ", ".join(texts[:count]) + rest
        if len(text) <= room:
            return text
    if not texts or room < 8:
        return ""
    rest = f" + {len(texts) - 1}" if len(texts) > 1 else ""
    return _cut(texts[0], room - len(rest)) + rest


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"  # 32.0 is written as 32 in a recipe
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _when(started: str) -> str:
    """Return a time by this machine's clock, in 12 characters: with its hour, or with its year where it is long ago."""
    try:
        time = dt.datetime.fromisoformat(started).astimezone()
    except (ValueError, OverflowError):
        return "?".ljust(12)
    recent = abs(dt.datetime.now(dt.UTC) - time) < _RECENT
    return f"{time:%d %b %H:%M}" if recent else f"{time:%d %b %Y} "


def _width() -> int:
    return shutil.get_terminal_size((_WIDTH, 24)).columns


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


def _runs(attempts: Sequence[Attempt]) -> list[ListedRun]:
    return [attempt.run for attempt in attempts]
