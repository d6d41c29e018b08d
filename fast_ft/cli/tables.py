"""What `data` and `plan` print: tables for people, one JSON object for programs."""

from __future__ import annotations

import statistics
from typing import Any

from fast_ft.common.console import labelled
from fast_ft.common.streams import new_console
from fast_ft.common.text_safety import harmless, plain
from fast_ft.common.wording import counted, minutes_between
from fast_ft.data.contamination import GRAM_WORDS
from fast_ft.data.curriculum import stage_spreads
from fast_ft.data.encoding import IGNORE_INDEX
from fast_ft.data.prepare import PreparedData, SelectedData
from fast_ft.data.why import left_out
from fast_ft.recipe.schema import Recipe


def selection_json(recipe: Recipe, prepared: SelectedData) -> dict[str, Any]:
    """Return `data --json`: selected, stages, rows, metrics, contract, duplicates, passed_over, leakage, notes.

    `selected` holds each row's id, stages, prompt and metrics, in training order.
    """
    stages = stages_of(prepared)
    measured = {row["id"]: row for row in prepared.selection.rows}
    names = sorted({name for row in measured.values() for name in row if name != "id"})
    rows = prepared.rows if isinstance(prepared, PreparedData) else {}
    checked = isinstance(prepared, PreparedData)
    return {
        "selected": [
            {
                "id": each.id,
                "stages": stages[each.id],
                "prompt": each.prompt,
                "metrics": {name: value for name, value in measured[each.id].items() if name != "id"},
            }
            for each in prepared.examples
        ],
        "stages": [each._asdict() for each in stage_spreads(recipe.curriculum, prepared.selection, prepared.stages)],
        "rows": {"pool": len(prepared.selection.pool), "selected": len(prepared.examples)},
        "metrics": {name: _summary([measured[e.id].get(name) for e in prepared.examples]) for name in names},
        "contract": {
            "checked": len(rows),
            "holds": True if checked else None,
            "prompt_tokens": _summary([len(r.labels) - r.supervised for r in rows.values()]),
            "supervised_tokens": _summary([r.supervised for r in rows.values()]),
        },
        "duplicates": [pair._asdict() for pair in prepared.selection.duplicates],
        "passed_over": [row._asdict() for row in left_out(recipe.select, prepared.selection)],
        "leakage": prepared.leakage,
        "notes": prepared.notes,
    }


def print_selection(recipe: Recipe, prepared: SelectedData, show: int) -> None:
    """Print what was selected and why; then `show` rows, each with trained and masked tokens told apart."""
    from rich.table import Table

    console = new_console()
    content = selection_json(recipe, prepared)
    title = f"{content['rows']['selected']} of {content['rows']['pool']:,} rows of {plain(recipe.data.train_name)}"
    console.print(title, markup=False)
    table = Table()
    for column in ("metric", "least", "median", "most"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    tokens = {name: content["contract"][name] for name in ("prompt_tokens", "supervised_tokens")}
    for name, summary in {**content["metrics"], **tokens}.items():
        if summary is not None:
            table.add_row(name, *(f"{summary[key]:g}" for key in ("least", "median", "most")))
    console.print(table)
    spreads = {each.stage: each for each in stage_spreads(recipe.curriculum, prepared.selection, prepared.stages)}
    for stage in prepared.stages:
        console.print(
            f"stage {stage.name}: {counted(len(stage.examples), 'row')}, {counted(stage.num_train_epochs, 'epoch')}, "
            f"learning rate {stage.learning_rate:g}, {stage.order}"
        )
        if stage.name in spreads:
            console.print(f"  {spreads[stage.name].sentence(recipe.curriculum.by)}", markup=False)
    for note in prepared.notes:
        console.print(labelled(plain(note)), markup=False)
    if isinstance(prepared, PreparedData):
        checked = counted(len(prepared.rows), "row")
        console.print(f"checked: {checked}. In each, the response and EOS are trained, and the prompt is masked.")
    hits = prepared.leakage["hits"]
    console.print(_contamination(len(hits), len(prepared.prompts)))
    for hit in hits:
        console.print(f"  {plain(hit['example'])} ~ {plain(hit['prompt'])} ({hit['kind']})", markup=False)
    for example in prepared.examples[:show]:
        print_row(prepared, example.id)


def stages_of(prepared: SelectedData) -> dict[str, list[str]]:
    """Return the names of each row's stages, by id."""
    found: dict[str, list[str]] = {}
    for stage in prepared.stages:
        for example in stage.examples:
            found.setdefault(example.id, []).append(stage.name)
    return found


def _contamination(hits: int, prompts: int) -> str:
    """Return what comparing the selected rows with the test prompts found."""
    if not prompts:
        return "test prompts: there are none to compare the rows with"
    rows = "no row equals one or shares" if hits == 0 else f"{counted(hits, 'row')} equal one or share"
    return f"test prompts: {counted(prompts, 'prompt')} compared with the rows; {rows} {GRAM_WORDS} words in sequence"


def print_row(prepared: SelectedData, row_id: str) -> None:
    """Print one row: masked tokens grey, trained tokens green and every other one underlined, so that borders show.

    Without colours, as in a pipe, masked and trained tokens stand in lines of their own, which say which they are.
    """
    from rich.text import Text

    if not isinstance(prepared, PreparedData):
        return
    row = prepared.rows[row_id]
    console, before = new_console(), None
    plain_text = console.no_color or console.color_system is None
    text = Text(
        f"\nrow {plain(row_id)}: {len(row.input_ids) - row.supervised} masked, {row.supervised} trained tokens\n"
    )
    shown = prepared.encoder.shown(row.input_ids)
    for index, ((piece, is_control), label) in enumerate(zip(shown, row.labels, strict=True)):
        masked = label == IGNORE_INDEX
        if plain_text and masked != before:
            text.append(("" if before is None else "\n") + ("masked   " if masked else "trained  "))
        before = masked
        style = "grey50" if masked else ("green", "green underline")[index % 2]
        piece = harmless(piece)
        if plain_text:
            piece = piece.replace("\n", f"\n{' ' * 9}")
        text.append(piece, "bold " + style if is_control else style)
    console.print(text, soft_wrap=plain_text)


def print_plan(content: dict[str, Any]) -> None:
    """Print what planner.describe returns: a table of stages and, where a card is known, what training takes there."""
    from rich.table import Table

    console, stages = new_console(), content["stages"]
    table = Table()
    for name in stages[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "stage" else "right")
    for entry in stages:
        cells = (
            minutes_between(*value) if key == "projected_minutes" else _cell(value) for key, value in entry.items()
        )
        table.add_row(*cells)
    console.print(table)
    if "way" in content:
        console.print(content["way"], markup=False)
    if "processes" in content:
        given = content["processes"]
        count, largest = given["world_size"], given["largest_share"]
        text = f"processes    {count}, one for each GPU; the fullest share of a step is {largest:.1%} of its tokens"
        console.print(text, markup=False)
        if given["note"]:
            console.print(f"             {given['note']}", markup=False)
    if "card" not in content:
        console.print("There is no GPU here. --gpu t4, or another card's name, projects minutes and memory for a card.")
        return
    card, plan, why = content["card"], content["plan"], content["why"]
    pieces = f"at most {counted(plan['micro_batch'], 'row')}" + (
        f" or {plan['most_tokens']:,} tokens" if plan["most_tokens"] else ""
    )
    again = plan["recompute_layers"]
    ways = f"of {again} layers computed again, the others' kept" if again else "kept"
    each = " on each" if plan["world_size"] > 1 else ""
    decoding = f", {plan['generate_gib']:.1f} in decoding" if "generate_gib" in plan else ""
    lines = [
        f"card         {card['name']}, {plan['memory_gib']:.1f} GiB, training at {_cell(card['tflops'])} TFLOP/s",
        f"             ({card['rates_from']})",
        f"backend      {plan['backend']}{', since ' * bool(why)}{why}",
        f"pass         {pieces}; activations {ways}{'; replayed from CUDA graphs' if plan['capture'] else ''}",
        f"memory       {plan['train_gib']:.1f} GiB predicted in training{each}{decoding}",
        f"minutes      {minutes_between(*content['projected_minutes'])} projected for training, not measured; "
        f"about {plan['step_seconds']:.2g} s a step",
        f"conclusion   {content['verdict']}",
    ]
    if found := content.get("validation"):
        rows, times = counted(found["rows"], "row"), counted(found["times"], "time")
        share = minutes_between(*found["projected_minutes"])
        lines.insert(-1, f"validation   {rows}, measured {times}: {share} of these minutes")
    if content["answer_minutes"]:
        allowed = content["answer_budget_minutes"]
        of = f", {allowed:g} allowed" if allowed is not None else ""
        minutes = minutes_between(*content["answer_minutes"])
        lines.insert(-1, f"answers      {minutes} minutes projected, not measured{of}")
    lines += [f"without      {text}" for text in card["lacks"]]
    for line in lines:
        console.print(harmless(line), markup=False)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(f"{each:g}" for each in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _summary(values: list[Any]) -> dict[str, float] | None:
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return None
    return {"least": min(numbers), "median": statistics.median(numbers), "most": max(numbers)}
