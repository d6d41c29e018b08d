"""Writes the pages: a run's report.html, a comparison of several runs, the map of a data set before any training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.outputs import check_output
from fast_ft.data.encoding import Encoder
from fast_ft.data.prepare import PreparedData, SelectedData, select_data
from fast_ft.report import overview, run_data
from fast_ft.report.comparison import compared
from fast_ft.report.data_map import NEUTRAL, Group, Points, measured, points
from fast_ft.report.html import bullets, is_page, page, paragraph
from fast_ft.report.plots import loss_picture, map_picture
from fast_ft.report.result import result
from fast_ft.report.run_names import given, named
from fast_ft.run.folder import RunDir

ABOUT = "This file holds training rows and the model's predictions."
WARNING = f"{ABOUT} The homework forbids to share either: keep it to yourself, and do not hand it in."
ROWS_ABOUT = "This file holds training rows."
ROWS_WARNING = f"{ROWS_ABOUT} The homework forbids to share them: keep this file to yourself."


def write_report(folder: RunDir, prepared: SelectedData | None = None) -> Path:
    """Write report.html, loss.png and map.png into a run folder, and return the page's path.

    prepared: the run's data, where it is at hand; else it is loaded again. Where that fails, or gives other rows than
    those that were trained on, the page has no map and says why.
    """
    run = run_data.read_run(folder)
    notes: list[str] = []
    if prepared is None:
        prepared = _prepared(folder, run, notes)
    content = {"answers": run_data.answers([run]), "curves": [run_data.curves(run)]}
    blocks: dict[str, bytes] = {}
    if prepared is not None:
        stages, pool = _stages(prepared), measured(prepared.selection.pool)
        groups = [Group(name, own, number) for number, (name, own) in enumerate(stages)]
        found = points(pool, groups, rows_of(prepared), encoder_of(prepared))
        content["map"], blocks = found.facts, found.blocks
        map_picture(folder.map_png, pool.table, stages)
    if run.lines and not _newer(folder.loss_png, folder.log):  # training has drawn it
        loss_picture(folder.loss_png, run.lines)
    rows = len(prepared.selection.pool) if prepared else None
    sections = [
        ("result", "Result", "\n".join([result(run), paragraph(overview.sentence(run, rows)), overview.figures(run)])),
        ("training", "Training", '<div id="curves"></div>' if run.lines else paragraph("No step was logged.")),
        ("map", "The data map", _map_markup(bool(blocks), len(run.manifest.stages))),
        ("answers", "Answers", '<div id="answer-view"></div>' if run.pred else paragraph("There are no answers yet.")),
        ("settings", "Settings", overview.settings(run, notes)),
    ]
    title = f"{given(run) or run.name} · fast_ft"
    atomic_files.write_text(folder.report, page(title, ABOUT, sections, content, blocks, _warning([run])))
    return folder.report


def try_report(folder: RunDir, prepared: SelectedData | None = None) -> None:
    """Write report.html, as write_report. The run is done by now, so a full disk is a note here and no failure."""
    try:
        write_report(folder, prepared)
    except InputError as error:
        note(f"no report: {error}")


def write_comparison(folders: Sequence[RunDir], output: Path) -> Path:
    """Write one page over several runs: curves over each other, recipe differences, wins, ties and losses.

    Raises InputError where `output` is a file that is no page of ours.
    """
    check_output(output, is_page, "comparison.html")
    runs = named([run_data.read_run(folder) for folder in folders])
    notes: list[str] = []
    prepared = [_prepared(folder, run, notes) for folder, run in zip(folders, runs, strict=True)]
    content = {"answers": run_data.answers(runs), "curves": [run_data.curves(run) for run in runs]}
    blocks: dict[str, bytes] = {}
    there = [p for p in prepared if p is not None]
    if len(there) == len(runs) and len({p.digests["train"] for p in there}) == 1:
        found = _shared_map(runs, there)
        content["map"], blocks = found.facts, found.blocks
    else:
        notes.append("No data map: the runs' training rows are not all at hand, or not from the same file.")
    sections = [
        ("runs", "The runs", f"{compared(runs)}{bullets(notes) if notes else ''}"),
        ("training", "Training", '<div id="curves"></div>'),
        ("map", "The data map", _map_markup(bool(blocks), notes_at="The runs")),
        ("answers", "Answers", '<div id="answer-view"></div>'),
    ]
    title = f"{len(runs)} runs compared · fast_ft"
    atomic_files.write_text(output, page(title, ABOUT, sections, content, blocks, _warning(runs)))
    return output


def _warning(runs: Sequence[run_data.Run]) -> str:
    """Return why the page is not to be shared: the homework's rules say so, and no other."""
    return WARNING if any(run.recipe.get("rules") for run in runs) else ""


def _newer(path: Path, than: Path) -> bool:
    return path.is_file() and path.stat().st_mtime_ns >= than.stat().st_mtime_ns


def _prepared(folder: RunDir, run: run_data.Run, notes: list[str]) -> SelectedData | None:
    """Load a run's data again; None, with a note, where they are gone or give other rows."""
    try:
        found = select_data(folder.recipe())
    except InputError as error:
        notes.append(f"No data map: the training rows could not be loaded again ({error}).")
        return None
    if [e.id for e in found.examples] != [row.id for row in run.manifest.rows]:
        notes.append("No data map: the training file now gives other rows than those that were trained on.")
        note(notes[-1])
        return None
    return found


def _stages(prepared: SelectedData) -> list[tuple[str, list[int]]]:
    """Return each stage's name with the positions in the pool of its rows."""
    position = _positions(prepared)
    return [(stage.name, [position[e.id] for e in stage.examples]) for stage in prepared.stages]


def _shared_map(runs: Sequence[run_data.Run], prepared: Sequence[SelectedData]) -> Points:
    """Return the map of the pool that all runs share; groups say which run took a row, or several."""
    taken = [set(_positions(p).values()) for p in prepared]
    several = {i for number, own in enumerate(taken) for other in taken[number + 1 :] for i in own & other}
    groups = [Group("in several runs", sorted(several), NEUTRAL)]
    groups += [
        Group(f"only in {run.name}", sorted(own - several), number)
        for number, (run, own) in enumerate(zip(runs, taken, strict=True))
    ]
    rows = {index: row for each in prepared for index, row in rows_of(each).items()}
    return points(prepared[0].selection.pool, [group for group in groups if group.rows], rows, encoder_of(prepared[0]))


def _positions(prepared: SelectedData) -> dict[str, int]:
    chosen = prepared.selection
    return {example.id: index for index, example in zip(chosen.indices, chosen.examples, strict=True)}


def rows_of(prepared: SelectedData) -> dict[int, Any]:
    if not isinstance(prepared, PreparedData):
        return {}
    position = _positions(prepared)
    return {position[id_]: row for id_, row in prepared.rows.items()}


def encoder_of(prepared: SelectedData) -> Encoder | None:
    return prepared.encoder if isinstance(prepared, PreparedData) else None


def _map_markup(there: bool, stages: int = 1, notes_at: str = "Settings") -> str:
    if not there:
        return paragraph(f"There is no map: the notes under {notes_at} say why.")
    first = "A row that several stages train on has the colour of the first." if stages > 1 else ""
    return f'<div id="data-map"></div>{paragraph(first, "hint") if first else ""}'
