"""What is printed of scores.json: some answers, a table by skill and difficulty, and, last, what the scores say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fast_ft.common.errors import InputError
from fast_ft.common.streams import new_console
from fast_ft.common.text_safety import plain
from fast_ft.run import artifacts
from fast_ft.run.folder import RunDir

Cells = Mapping[str, Any]
_NAME = 24  #: columns of a skill's name, which goes on in the next line


def print_scores(folder: RunDir, examples: int = 3) -> None:
    """Print some answers before and after, then a run's scores, the base model's beside them; the result comes last."""
    scores = artifacts.read_scores(folder.scores).given()
    try:
        remarks = _remarks(scores)
        table = _table(scores)
    except (LookupError, TypeError) as error:
        raise InputError(f"{folder.scores}: not as `judge` writes it ({error!r}): judge the run again") from None
    if scores.get("base") is not None and folder.base_pred.is_file():
        _print_answers(folder, examples)
    console = new_console()
    console.print(table)
    for line in remarks:
        console.print(plain(line), markup=False)


def _print_answers(folder: RunDir, count: int) -> None:
    """Print `count` prompts, evenly from the first to the last, with the base model's answer and the tuned one's."""
    from rich.markup import escape

    console = new_console()
    pred, before = artifacts.read_pred(folder.pred), artifacts.read_pred(folder.base_pred)
    both = [key for key in before if key in pred]
    for key in both[:: max(1, len(both) // count)][:count]:
        console.print(f"[bold]{escape(plain(pred[key].question))}[/bold]")
        console.print(f"  base   {escape(plain(before[key].answer))}")
        console.print(f"  tuned  {escape(plain(pred[key].answer))}\n")


def _table(scores: Cells) -> Any:
    """Return the table by skill and difficulty, at most 80 columns wide."""
    from rich.markup import escape
    from rich.table import Table

    base = scores.get("base")
    judged = scores["kind"] == "openai"
    matched = "manner" if "matches" in scores else "exact"
    cells, names = (_judged, ["mean", "95 %"]) if judged else (_matched, [matched, "ROUGE-L"])
    headings = names if base is None else [f"{who}\n{name}" for who in ("base", "tuned") for name in names]
    table = Table()
    table.add_column("prompts", overflow="fold", max_width=_NAME)
    for column in ("count", *headings):
        table.add_column(column, justify="right", no_wrap=True)

    def row(name: str, each: Cells, before: Cells | None) -> None:
        """Add a row, with the base model's scores where there are any."""
        beside = [] if base is None else [""] * len(names) if before is None else cells(before)
        name += _missing(each, "") + _missing(before or {}, "base ")
        table.add_row(escape(plain(name)), str(each["count"]), *beside, *cells(each))

    for group, label in (("by_skill", ""), ("by_difficulty", "difficulty ")):
        for name, each in scores.get(group, {}).items():
            row(label + name, each, None if base is None else base.get(group, {}).get(name))
        table.add_section()
    row("all", scores, base)
    return table


def _missing(each: Cells, whose: str) -> str:
    return f" ({whose}{each['missing']} missing)" if each.get("missing") else ""


def _matched(each: Cells) -> list[str]:
    return [f"{each['mean']:.0%}", f"{each['rouge_l']:.2f}"]


def _judged(each: Cells) -> list[str]:
    mean = "" if each["mean"] is None else f"{each['mean']:.2f}"
    return [mean, "" if each["low"] is None else f"{each['low']:.2f}-{each['high']:.2f}"]


def _remarks(scores: Cells) -> list[str]:
    lines = []
    if scores["kind"] == "openai":
        by = scores["model"] if scores["answered_by"] in ([], [scores["model"]]) else ", ".join(scores["answered_by"])
        lines.append(f"judge: {by}, {scores['labelled']}, 1 to 10")
        if scores["reference_mean"] is not None:
            lines.append(f"the reference answers: {scores['reference_mean']:.2f}")
        if "baselines" in scores:
            values = ", ".join(f"{name} {value:g}" for name, value in scores["baselines"].items())
            lines.append(f"the homework's baselines, by its own judge: {values}")
        if scores["swapped"]:
            lines.append(f"an answer scored {scores['swapped']['order_effect']:+.2f} when it stood first")
    else:
        low = scores["low"]
        between = "" if low is None else f" (95 % interval {low:.0%} to {scores['high']:.0%})"
        matched = "in the manner" if "matches" in scores else "exact match"
        lines.append(
            f"{matched} {scores['mean']:.0%}{between}, chrF {scores['chrf']:.2f}, "
            f"answers {scores['length_ratio']:.2f} times as long as their references"
        )
    lines += [scores[key]["sentence"] for key in ("gain", "against") if key in scores]
    return [f"note: {text}" for text in scores["notes"]] + lines
