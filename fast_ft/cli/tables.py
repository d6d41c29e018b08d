"""What `data`, `plan` and `runs` print: tables for people, one JSON object for programs."""

from __future__ import annotations

import json
import statistics
from typing import Any

from fast_ft.common.streams import new_console
from fast_ft.common.text_safety import harmless, plain
from fast_ft.data.encoding import IGNORE_INDEX
from fast_ft.data.prepare import PreparedData, SelectedData
from fast_ft.homework.ledger import Ledger
from fast_ft.recipe.schema import Recipe


def selection_json(prepared: SelectedData) -> dict[str, Any]:
    """Return `data --json`: selected (ids in training order, with stages), rows, metrics, contract, ..."""
    stages_of: dict[str, list[str]] = {}
    for stage in prepared.stages:
        for example in stage.examples:
            stages_of.setdefault(example.id, []).append(stage.name)
    measured = {row["id"]: row for row in prepared.selection.rows}
    names = sorted({name for row in measured.values() for name in row if name != "id"})
    rows = prepared.rows if isinstance(prepared, PreparedData) else {}
    checked = isinstance(prepared, PreparedData)
    return {
        "selected": [{"id": e.id, "stages": stages_of[e.id]} for e in prepared.examples],
        "rows": {"pool": len(prepared.selection.pool), "selected": len(prepared.examples)},
        "metrics": {name: _summary([measured[e.id].get(name) for e in prepared.examples]) for name in names},
        "contract": {
            "checked": len(rows),
            "holds": True if checked else None,
            "prompt_tokens": _summary([len(r.labels) - r.supervised for r in rows.values()]),
            "supervised_tokens": _summary([r.supervised for r in rows.values()]),
        },
        "duplicates": [pair._asdict() for pair in prepared.selection.duplicates],
        "leakage": prepared.leakage,
        "notes": prepared.notes,
    }


def print_selection(recipe: Recipe, prepared: SelectedData, show: int) -> None:
    """Print what was selected and why; then `show` rows, each with trained and masked tokens told apart."""
    from rich.table import Table
    from rich.text import Text

    console = new_console()
    content = selection_json(prepared)
    title = f"{content['rows']['selected']} of {content['rows']['pool']:,} rows of {plain(recipe.data.train_name)}"
    table = Table(title=Text(title), title_justify="left")
    for column in ("metric", "least", "median", "most"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    tokens = {name: content["contract"][name] for name in ("prompt_tokens", "supervised_tokens")}
    for name, summary in {**content["metrics"], **tokens}.items():
        if summary is not None:
            table.add_row(name, *(f"{summary[key]:g}" for key in ("least", "median", "most")))
    console.print(table)
    for stage in prepared.stages:
        console.print(
            f"stage {stage.name}: {len(stage.examples)} rows, {stage.num_train_epochs} epochs, "
            f"learning rate {stage.learning_rate:g}, {stage.order}"
        )
    for note in prepared.notes:
        console.print(f"note: {plain(note)}", markup=False)
    if isinstance(prepared, PreparedData):
        console.print(f"contract: holds for all {len(prepared.rows)} rows (one BOS, prompt masked, EOS trained)")
    hits = prepared.leakage["hits"]
    console.print(f"leakage: {len(hits)} rows equal or overlap one of {len(prepared.prompts)} test prompts")
    for hit in hits:
        console.print(f"  {plain(hit['example'])} ~ {plain(hit['prompt'])} ({hit['kind']})", markup=False)
    for example in prepared.examples[:show]:
        print_row(prepared, example.id)


def print_row(prepared: SelectedData, row_id: str) -> None:
    """Print one row: masked tokens grey, trained tokens green on alternating ground, so that borders show."""
    from rich.text import Text

    if not isinstance(prepared, PreparedData):
        return
    row = prepared.rows[row_id]
    text = Text(
        f"\nrow {plain(row_id)}: {len(row.input_ids) - row.supervised} masked, {row.supervised} trained tokens\n"
    )
    controls = {prepared.encoder.bos_id: "<BOS>", prepared.encoder.eos_id: "<EOS>"}
    pieces = prepared.encoder.pieces(row.input_ids)
    for index, (token, label, piece) in enumerate(zip(row.input_ids, row.labels, pieces, strict=True)):
        style = "grey50" if label == IGNORE_INDEX else ("green", "green underline")[index % 2]
        shown = controls.get(token) or harmless(piece)
        text.append(shown, "bold " + style if token in controls else style)
    new_console().print(text)


def print_plan(content: dict[str, Any]) -> None:
    """Print what planner.describe returns: a table of stages and, where a card is known, what training takes there."""
    from rich.table import Table

    console, stages = new_console(), content["stages"]
    table = Table()
    for name in stages[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "stage" else "right")
    for entry in stages:
        table.add_row(*(_cell(value) for value in entry.values()))
    console.print(table)
    if "processes" in content:
        given = content["processes"]
        count, largest = given["world_size"], given["largest_share"]
        text = f"processes    {count}, one for each GPU; the fullest share of a step is {largest:.1%} of its tokens"
        console.print(text, markup=False)
        if given["note"]:
            console.print(f"             {given['note']}", markup=False)
    if "card" not in content:
        console.print("no GPU here: minutes and memory are projected with --gpu t4 (or another card)", markup=False)
        return
    card, plan = content["card"], content["plan"]
    pieces = f"at most {plan['micro_batch']} rows" + (
        f" or {plan['most_tokens']:,} tokens" if plan["most_tokens"] else ""
    )
    again = plan["recompute_layers"]
    ways = f"of {again} layers computed again, the others' kept" if again else "kept"
    each = " on each" if plan["world_size"] > 1 else ""
    lines = [
        f"card         {card['name']}, {plan['memory_gib']:.1f} GiB, training at {_cell(card['tflops'])} TFLOP/s",
        f"             ({card['rates_from']})",
        f"backend      {plan['backend']}",
        f"pass         {pieces}; activations {ways}{'; replayed from CUDA graphs' if plan['capture'] else ''}",
        f"memory       {plan['train_gib']:.1f} GiB predicted in training{each}, {plan['generate_gib']:.1f} in decoding",
        f"minutes      {_cell(content['projected_minutes'])} projected for training, not measured; "
        f"{plan['step_seconds']:.2g} s a step in between",
        f"verdict      {content['verdict']}",
    ]
    if content["answer_minutes"]:
        allowed = content["answer_budget_minutes"]
        of = f", {allowed:g} allowed" if allowed is not None else ""
        lines.insert(-1, f"answers      {_cell(content['answer_minutes'])} minutes projected, not measured{of}")
    lines += [f"without      {text}" for text in card["lacks"]]
    for line in lines:
        console.print(harmless(line), markup=False)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(f"{each:g}" for each in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_runs(ledger: Ledger) -> None:
    """Print the run folders, the recipe keys that differ among them, and what the ledger has to say of them."""
    from rich.table import Table
    from rich.text import Text

    if not ledger.attempts:
        print("no runs here yet")
        return
    keys = list(ledger.attempts[0].row["keys"])
    public = ["public"] if any(attempt.submissions for attempt in ledger.attempts) else []
    table = Table()
    for name in ("folder", "started", "finished", "minutes", "score", *public):
        table.add_column(name, overflow="fold")
    table.add_column("what differs", overflow="fold", ratio=1)  # a column for each key would leave each two letters
    for attempt in ledger.attempts:
        row = attempt.row
        score = "" if row["score"] is None else f"{row['score']:.3f}"
        said = ["" if attempt.public is None else f"{attempt.public:g}"] if public else []
        values = "\n".join(f"{key}={json.dumps(row['keys'][key])}" for key in keys)
        phase, minutes = row["phase"] or "nothing", f"{row['minutes']}"
        cells = (row["folder"], str(row["started"])[:16], phase, minutes, score, *said, values)
        table.add_row(*(Text(harmless(cell)) for cell in cells))
    new_console().print(table)
    for sentence in ledger.sentences():
        new_console().print(harmless(sentence), markup=False, soft_wrap=True)


def _summary(values: list[Any]) -> dict[str, float] | None:
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return None
    return {"least": min(numbers), "median": statistics.median(numbers), "most": max(numbers)}
