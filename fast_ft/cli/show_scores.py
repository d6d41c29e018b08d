"""What is printed of scores.json: by skill and difficulty, beside the base model and another run, and what it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fast_ft.common.errors import InputError
from fast_ft.common.streams import new_console
from fast_ft.common.text_safety import plain
from fast_ft.run import artifacts
from fast_ft.run.folder import RunDir

Cells = Mapping[str, Any]


def print_scores(folder: RunDir, examples: int = 3) -> None:
    """Print a run's scores, the base model's beside them, and some answers before and after."""
    from rich.markup import escape

    scores = artifacts.read_scores(folder.scores).given()
    try:
        remarks = _remarks(scores)
        table = _table(scores)
    except (LookupError, TypeError) as error:
        raise InputError(f"{folder.scores}: not as `judge` writes it ({error!r}): judge the run again") from None
    console = new_console()
    console.print(table)
    for line in remarks:
        console.print(plain(line), markup=False)
    if scores.get("base") is None or not folder.base_pred.is_file():
        return
    pred, before = artifacts.read_pred(folder.pred), artifacts.read_pred(folder.base_pred)
    both = [key for key in before if key in pred]
    for key in both[:: max(1, len(both) // examples)][:examples]:
        console.print(f"\n[bold]{escape(plain(pred[key].question))}[/bold]")
        console.print(f"  base   {escape(plain(before[key].answer))}")
        console.print(f"  tuned  {escape(plain(pred[key].answer))}")


def _table(scores: Cells) -> Any:
    """Return the table by skill and difficulty."""
    from rich.markup import escape
    from rich.table import Table

    base = scores.get("base")
    judged = scores["kind"] == "openai"
    cells, names = (_judged, ["mean", "95 %", "missing"]) if judged else (_matched, [_share(scores), "ROUGE-L"])
    headings = names if base is None else [f"base: {names[0]}", *names[1:], f"tuned: {names[0]}", *names[1:]]
    table = Table()
    for column in ("prompts", "count", *headings):
        table.add_column(column, justify="left" if column == "prompts" else "right")

    def row(name: str, each: Cells, before: Cells | None) -> None:
        """Add a row, with the base model's scores where there are any."""
        beside = [] if base is None else [""] * len(names) if before is None else cells(before)
        table.add_row(escape(plain(name)), str(each["count"]), *beside, *cells(each))

    for group, label in (("by_skill", ""), ("by_difficulty", "difficulty ")):
        for name, each in scores.get(group, {}).items():
            row(label + name, each, None if base is None else base.get(group, {}).get(name))
        table.add_section()
    row("all", scores, base)
    return table


def _share(scores: Cells) -> str:
    """Return what the reference judge's scores are the share of."""
    return "in the manner" if "matches" in scores else "exact match"


def _matched(each: Cells) -> list[str]:
    return [f"{each['mean']:.0%}", f"{each['rouge_l']:.2f}"]


def _judged(each: Cells) -> list[str]:
    mean = "" if each["mean"] is None else f"{each['mean']:.2f}"
    between = "" if each["low"] is None else f"{each['low']:.2f} to {each['high']:.2f}"
    return [mean, between, str(each["missing"] or "")]


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
        lines.append(
            f"{_share(scores)} {scores['mean']:.0%}{between}, chrF {scores['chrf']:.2f}, "
            f"answers {scores['length_ratio']:.2f} times as long as their references"
        )
    lines += [scores[key]["sentence"] for key in ("gain", "against") if key in scores]
    return lines + [f"note: {text}" for text in scores["notes"]]
